// The page: a document and its map, a chat, and how the answers are decoded.
import { html, render, useEffect, useReducer, useState } from "./vendor/preact.js";
import { serverInfo } from "./api.js";
import { ChatPane } from "./chat.js";
import { Conversation, MODES } from "./conversation.js";
import { DocumentPane, readTextFile } from "./document.js";

// How long to wait for a server that is not ready, before it is asked again.
const AGAIN_MS = 2000;

const conversation = new Conversation(() => redraw());
let redraw = () => {};

function change(edit) {
  edit(conversation);
  conversation.changed();
}

function Modes() {
  return html`<fieldset class="modes">
    <legend class="hidden">Decoding</legend>
    ${MODES.map(({ name, title, help }) => html`<label key=${name} title=${help}>
      <input type="radio" name="mode" value=${name} checked=${conversation.mode === name}
        onChange=${() => change((it) => (it.mode = name))} />${title}
    </label>`)}
    <label>beside <select aria-label="Compare with" value=${conversation.second}
      onChange=${(event) => change((it) => (it.second = event.target.value))}>
      <option value="">nothing</option>
      ${MODES.map(({ name, title }) => html`<option key=${name} value=${name}
        disabled=${conversation.mode === name}>${title}</option>`)}
    </select></label>
  </fieldset>`;
}

const SETTINGS = [
  ["maxTokens", "longest answer", { min: 1, step: 1, placeholder: "any" }],
  ["temperature", "temperature", { min: 0, step: 0.1, placeholder: "the model's" }],
  ["tokenBudget", "token budget", { min: 1, step: 1, placeholder: "the plan's" }],
];

function Settings() {
  return html`<details class="settings">
    <summary>Settings</summary>
    <div>
      ${SETTINGS.map(([name, title, more]) => html`<label key=${name}>${title}
        <input type="number" ...${more} value=${conversation.settings[name]}
          onInput=${(event) => change((it) => (it.settings[name] = event.target.value))} />
      </label>`)}
    </div>
  </details>`;
}

function Theme() {
  const isDarkSystem = matchMedia("(prefers-color-scheme: dark)").matches;
  const [theme, setTheme] = useState(
    () => localStorage.getItem("theme") ?? (isDarkSystem ? "dark" : "light"),
  );
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
    conversation.changed(); // the map has colours of its own
  }, [theme]);
  const flip = () => {
    const other = theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", other);
    setTheme(other);
  };
  return html`<button onClick=${flip} aria-label="Dark mode" aria-pressed=${theme === "dark"}>
    ${theme === "dark" ? "☀" : "☾"}</button>`;
}

function useDroppedFiles() {
  const [isOver, setOver] = useState(false);
  useEffect(() => {
    const onOver = (event) => {
      event.preventDefault();
      setOver(true);
    };
    const onLeave = (event) => {
      if (!event.relatedTarget) setOver(false);
    };
    const onDrop = async (event) => {
      event.preventDefault();
      setOver(false);
      const [file] = event.dataTransfer.files;
      if (!file) return;
      try {
        conversation.setDocument(await readTextFile(file));
      } catch (error) {
        change((it) => (it.problem = error.message));
      }
    };
    addEventListener("dragover", onOver);
    addEventListener("dragleave", onLeave);
    addEventListener("drop", onDrop);
    return () => {
      removeEventListener("dragover", onOver);
      removeEventListener("dragleave", onLeave);
      removeEventListener("drop", onDrop);
    };
  }, []);
  return isOver;
}

function App() {
  const [, draw] = useReducer((count) => count + 1, 0);
  redraw = draw;
  const [info, setInfo] = useState(null);
  useEffect(() => {
    const look = async () => {
      let problem = "";
      try {
        setInfo(await serverInfo());
      } catch (error) {
        problem = error.message;
        setTimeout(look, AGAIN_MS);
      }
      change((it) => (it.problem = problem));
    };
    look();
  }, []);
  const isOver = useDroppedFiles();
  return html`<header class="top">
      <h1>${info ? info.model_id : "tidaldecode"}</h1>
      ${info && html`<span class="faint" title="plan ${info.plan} (${info.plan_source})">
        ${info.device}, up to ${info.max_model_len.toLocaleString()} tokens${
          /^[Fw]*$/.test(info.plan) ? "; without a plan, all answers are dense" : ""}</span>`}
      <span class="spring"></span>
      <${Modes} />
      <${Settings} />
      <button onClick=${() => conversation.clear()}>New chat</button>
      <${Theme} />
    </header>
    <main class=${isOver ? "over" : ""}>
      <${DocumentPane} conversation=${conversation} />
      <${ChatPane} conversation=${conversation} />
    </main>`;
}

render(html`<${App} />`, document.body);
