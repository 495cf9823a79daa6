// Questions, answers, and what the answers have cost.
import { html, useEffect, useMemo, useRef, useState } from "./vendor/preact.js";
import { marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";
import { MODES, figures } from "./conversation.js";

// Markup in an answer is text like any other, and so are pictures: the page loads none.
const asText = ({ raw }) => raw.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
marked.use({ renderer: { html: asText, image: asText } });

// A link that is followed leaves the chat where it is, and says nothing of it.
DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

function markdown(text) {
  return DOMPurify.sanitize(marked.parse(text), { FORBID_TAGS: ["style", "form", "input", "img"] });
}

function titleOf(mode) {
  return MODES.find(({ name }) => name === mode).title;
}

function shown(value, digits) {
  return value === null ? "–" : value.toLocaleString(undefined, { maximumFractionDigits: digits });
}

function Figures({ run }) {
  const of = figures(run);
  const entries = [
    ["first token", `${shown(of.firstTokenMs, 0)} ms`],
    ["a token", `${shown(of.msPerToken, 2)} ms`],
    ["read a step", `${shown(of.tokensPerStep, 0)} of ${shown(of.promptTokens, 0)} tokens`],
  ];
  if (of.cachedTokens) entries.push(["from the cache", `${shown(of.cachedTokens, 0)} tokens`]);
  if (of.accepted !== null) entries.push(["drafts kept", `${shown(of.accepted * 100, 0)} %`]);
  return html`<dl class="figures">
    ${entries.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>`;
}

function Progress({ run }) {
  if (run.state === "waiting" || run.state === "queued") {
    return html`<p class="faint">${run.state === "queued" ? "next" : "waiting…"}</p>`;
  }
  if (run.state !== "reading" || !run.progress) return null;
  const { total, processed } = run.progress;
  return html`<label class="faint progress">reads the prompt: ${processed.toLocaleString()} of
    ${" "}${total.toLocaleString()} tokens <progress max=${total} value=${processed}></progress>
  </label>`;
}

function Run({ run, conversation }) {
  const [isCopied, setCopied] = useState(false);
  const show = () => {
    conversation.shown = run;
    conversation.changed();
  };
  const copy = async () => {
    await copyText(run.text);
    setCopied(true);
    setTimeout(() => setCopied(false), 1200);
  };
  const isShown = conversation.shown === run;
  const answer = useMemo(() => ({ __html: markdown(run.text) }), [run.text]);
  return html`<article class="run ${isShown ? "shown" : ""}" data-mode=${run.mode}
    data-state=${run.state} aria-label="${titleOf(run.mode)} answer">
    <header>
      <button onClick=${show} aria-pressed=${isShown} title="Show on the map what it read">
        ${titleOf(run.mode)}
      </button>
      <span class="spring"></span>
      ${run.text && html`<button onClick=${copy}>${isCopied ? "Copied" : "Copy"}</button>`}
    </header>
    <${Progress} run=${run} />
    ${run.reasoning && html`<details class="reasoning faint" open=${!run.text}>
      <summary>reasoning</summary>${run.reasoning}</details>`}
    <div class="answer" aria-live="polite" dangerouslySetInnerHTML=${answer}></div>
    ${run.state === "stopped" && html`<p class="faint">stopped</p>`}
    ${run.finishReason === "length" && html`<p class="faint">ended at its longest</p>`}
    ${run.problem && html`<p class="problem" role="alert">${run.problem}</p>`}
    <${Figures} run=${run} />
  </article>`;
}

async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  // Without TLS, off this machine, a browser has no clipboard but this one.
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function Turn({ turn, conversation, edit }) {
  return html`<section class="turn">
    <div class="question">
      <p>${turn.question}</p>
      <span class="actions">
        <button onClick=${() => edit(turn)}>Edit</button>
        <button onClick=${() => conversation.retry(turn)}>Retry</button>
      </span>
    </div>
    <div class="runs">
      ${turn.runs.map((run, i) => html`<${Run} key=${i} run=${run} conversation=${conversation} />`)}
    </div>
  </section>`;
}

export function ChatPane({ conversation }) {
  const [question, setQuestion] = useState("");
  const input = useRef(null);
  const log = useRef(null);
  const follows = useRef(true);
  useEffect(() => {
    if (follows.current) log.current.scrollTop = log.current.scrollHeight;
  });
  useEffect(() => {
    const onKey = (event) => {
      const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
      if (event.key === "Escape") conversation.stop();
      if (event.key !== "/" || isTyping) return;
      event.preventDefault();
      input.current.focus();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
  const edit = (turn) => {
    setQuestion(conversation.takeBack(turn));
    input.current.focus();
  };
  const send = () => {
    if (conversation.isBusy || !question.trim()) return;
    follows.current = true;
    conversation.ask(question);
    setQuestion("");
  };
  const onKey = (event) => {
    const { turns } = conversation;
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    } else if (event.key === "ArrowUp" && question === "" && turns.length > 0) {
      event.preventDefault();
      edit(turns.at(-1));
    }
  };
  const onScroll = () => {
    const { scrollTop, scrollHeight, clientHeight } = log.current;
    follows.current = scrollHeight - scrollTop - clientHeight < 40;
  };
  return html`<section class="chat" aria-label="Chat">
    <div class="log" ref=${log} onScroll=${onScroll}>
      ${conversation.turns.map((turn, i) => html`<${Turn} key=${i} turn=${turn}
        conversation=${conversation} edit=${edit} />`)}
      ${conversation.turns.length === 0 && html`<p class="empty">Ask something. Enter sends,
        Shift+Enter begins a line, Esc stops, / comes back here, ↑ edits the last question.</p>`}
    </div>
    ${conversation.problem && html`<p class="problem" role="alert">${conversation.problem}</p>`}
    <form class="ask" onSubmit=${(event) => { event.preventDefault(); send(); }}>
      <textarea ref=${input} rows="2" aria-label="Question" value=${question} autofocus
        placeholder=${conversation.document ? `Ask about ${conversation.document.name}` : "Ask"}
        onInput=${(event) => setQuestion(event.target.value)} onKeyDown=${onKey}></textarea>
      ${conversation.isBusy
        ? html`<button type="button" onClick=${() => conversation.stop()}>Stop</button>`
        : html`<button type="submit" disabled=${!question.trim()}>Ask</button>`}
    </form>
  </section>`;
}
