// The document beside its map: what was read most is tinted, and can be jumped to.
import { html, useEffect, useRef, useState } from "./vendor/preact.js";
import { Minimap } from "./minimap.js";

const NUM_PASSAGES = 5;
const MAX_BYTES = 16 * 2 ** 20;

// Reads a text file; throws Error for what is none.
export async function readTextFile(file) {
  if (file.size > MAX_BYTES) {
    throw new Error(`${file.name} has ${file.size} bytes, at most ${MAX_BYTES} are taken`);
  }
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} is no text in UTF-8`);
  }
  if (text.includes("\0")) throw new Error(`${file.name} is no text`);
  if (!text.trim()) throw new Error(`${file.name} is empty`);
  return { name: file.name, text: text.replaceAll("\r\n", "\n") };
}

function Text({ text, run, place, pieces }) {
  const box = useRef(null);
  const spans = useRef(new Map());
  useEffect(() => {
    if (pieces.length === 0) return;
    const levels = run.reading.levels();
    for (const { bin, isOwn } of pieces) {
      const span = spans.current.get(bin);
      if (span) span.dataset.level = isOwn ? Math.ceil(levels[bin] * 5) : 0;
    }
  });
  useEffect(() => {
    const span = place ? spans.current.get(place.bin) : null;
    if (!span) return undefined;
    const top = span.offsetTop - box.current.offsetTop;
    box.current.scrollTop = top - box.current.clientHeight / 3;
    span.classList.add("reached");
    const timer = setTimeout(() => span.classList.remove("reached"), 1500);
    return () => {
      clearTimeout(timer);
      span.classList.remove("reached");
    };
  }, [place]);
  const parts = pieces.length === 0 ? text : pieces.map(({ bin, start, end }) => html`<span
    key=${bin} data-bin=${bin} ref=${(span) => span && spans.current.set(bin, span)}
  >${text.slice(start, end)}</span>`);
  return html`<div ref=${box} class="text" tabindex="0" aria-label="The document">${parts}</div>`;
}

function Passages({ conversation, run, text, jump }) {
  const passages = run && run.reading ? run.reading.passages(NUM_PASSAGES) : [];
  if (passages.length === 0) return null;
  const { reading } = run;
  const choose = (event) => {
    reading.layer = Number(event.target.value);
    conversation.changed();
  };
  return html`<label class="tinted faint">most read by layer
    ${" "}<select value=${reading.layer} onChange=${choose}>
      ${[...reading.layers.keys()].map((layer) => html`<option key=${layer} value=${layer}
        selected=${layer === reading.layer}>${layer}</option>`)}
    </select>
  </label>
  <ol class="passages" aria-label="Passages most read">
    ${passages.map(({ bin, start, end }) => html`<li key=${bin}>
      <button onClick=${() => jump(bin)} title="Show it in the document">
        ${text.slice(start, Math.min(end, start + 160)).trim()}
      </button>
    </li>`)}
  </ol>`;
}

function Chooser({ take, fail }) {
  const choose = async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    try {
      take(await readTextFile(file));
    } catch (error) {
      fail(error.message);
    }
  };
  return html`<label class="button">Open a text…
    <input type="file" class="hidden" accept="text/*,.txt,.md" onChange=${choose} />
  </label>`;
}

export function DocumentPane({ conversation }) {
  const [place, setPlace] = useState(null);
  const { document: opened, shown: run } = conversation;
  const jump = (bin) => setPlace({ bin });
  const take = (document) => conversation.setDocument(document);
  const fail = (message) => {
    conversation.problem = message;
    conversation.changed();
  };
  const pieces = run && run.reading ? run.reading.pieces : [];
  const tokens = run && run.reading ? `, ${run.reading.promptTokens.toLocaleString()} tokens` : "";
  return html`<section class="document" aria-label="Document">
    <header>
      <strong>${opened ? opened.name : "No document"}</strong>
      ${opened && html`<span class="faint">
        ${opened.text.length.toLocaleString()} characters${tokens}</span>`}
      <span class="spring"></span>
      <${Chooser} take=${take} fail=${fail} />
      ${opened && html`<button onClick=${() => take(null)}>Close</button>`}
    </header>
    <div class="reading">
      <${Minimap} run=${run} jump=${jump} />
      ${opened
        ? html`<${Text} key=${opened.name} text=${opened.text} run=${run} place=${place}
            pieces=${pieces} />`
        : html`<p class="empty">Drop a text file here, a book say, and ask about it. The strip on
            the left then shows which parts of it each choosing layer reads while the answer is
            written.</p>`}
    </div>
    ${opened && html`<${Passages} conversation=${conversation} run=${run} text=${opened.text} jump=${jump} />`}
  </section>`;
}
