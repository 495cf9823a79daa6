// The conversation: turns of a question and one or two answers, and how each is made.
import { streamChat } from "./api.js";
import { Reading } from "./reading.js";

export const MODES = [
  { name: "tidal", title: "Tidal", help: "a few layers choose tokens, the others read those" },
  { name: "full", title: "Dense", help: "every layer reads every token" },
  { name: "verified", title: "Verified", help: "drafts that dense passes check" },
];

// How often the page is drawn while an answer comes.
const DRAW_MS = 60;

export class Conversation {
  // draw: called soon after anything has changed.
  constructor(draw) {
    this.document = null; // {name, text}
    this.turns = [];
    this.mode = "tidal";
    this.second = ""; // the mode to compare with; "" for none
    this.settings = { maxTokens: "", temperature: "", tokenBudget: "" };
    this.shown = null; // the run whose reading the map shows
    this.problem = "";
    this._draw = draw;
    this._timer = 0;
    this._drawnAt = 0;
    this._stopper = null;
    this._stopped = null; // settles when the answers under way have ended
  }

  get isBusy() {
    return this._stopper !== null;
  }

  changed() {
    if (this._timer) return;
    const wait = Math.max(0, this._drawnAt + DRAW_MS - performance.now());
    this._timer = setTimeout(() => {
      this._timer = 0;
      this._drawnAt = performance.now();
      this._draw();
    }, wait);
  }

  setDocument(document) {
    this.stop();
    this.document = document;
    this.turns = [];
    this.shown = null;
    this.problem = "";
    this.changed();
  }

  clear() {
    this.setDocument(this.document);
  }

  async ask(question) {
    if (this.isBusy || !question.trim()) return;
    const turn = { question, runs: [] };
    this.turns.push(turn);
    await this._answer(turn);
  }

  // Answers a turn anew; what came after it is gone.
  async retry(turn) {
    while (this.isBusy) {
      this.stop();
      await this._stopped;
    }
    if (!this.turns.includes(turn)) return;
    this.turns.length = this.turns.indexOf(turn) + 1;
    await this._answer(turn);
  }

  // Takes a turn and all after it back; gives its question.
  takeBack(turn) {
    this.stop();
    this.turns.length = this.turns.indexOf(turn);
    this.shown = null;
    this.changed();
    return turn.question;
  }

  stop() {
    if (this._stopper) this._stopper.abort();
  }

  // The two runs of a comparison come one after the other, so that neither slows the other.
  async _answer(turn) {
    const modes = [this.mode];
    if (this.second && this.second !== this.mode) modes.push(this.second);
    turn.runs = modes.map((mode) => newRun(mode));
    const stopper = (this._stopper = new AbortController());
    let ended;
    this._stopped = new Promise((resolve) => (ended = resolve));
    try {
      for (const run of turn.runs) await this._run(turn, run, stopper.signal);
    } finally {
      if (this._stopper === stopper) this._stopper = null;
      ended();
      this.changed();
    }
  }

  async _run(turn, run, signal) {
    if (signal.aborted) {
      run.state = "stopped";
      return;
    }
    // A dense answer beside another has nothing to see on the map.
    if (run === turn.runs[0] || run.mode !== "full") this.shown = run;
    run.state = "waiting";
    run.askedAt = performance.now();
    this.changed();
    try {
      await streamChat(this._body(turn, run.mode), (event) => this._hear(run, event), signal);
      run.state = "done";
    } catch (error) {
      run.state = signal.aborted ? "stopped" : "failed";
      run.problem = signal.aborted ? "" : error.message;
    }
  }

  // What is sent for a turn: it and those before it that have an answer.
  _messages(turn) {
    const messages = [];
    for (const each of this.turns) {
      if (each !== turn && !each.runs[0].text) continue;
      const isFirst = messages.length === 0;
      const before = isFirst && this.document ? `${this.document.text}\n\n` : "";
      messages.push({ role: "user", content: before + each.question });
      if (each === turn) break;
      messages.push({ role: "assistant", content: each.runs[0].text });
    }
    return messages;
  }

  _body(turn, mode) {
    const messages = this._messages(turn);
    this._content = messages[0].content;
    const body = {
      messages,
      attention: mode,
      return_selection: true,
      return_progress: true,
      stream_options: { include_usage: true },
    };
    const { maxTokens, temperature, tokenBudget } = this.settings;
    if (maxTokens !== "") body.max_tokens = Number(maxTokens);
    if (temperature !== "") body.temperature = Number(temperature);
    if (tokenBudget !== "" && mode !== "full") body.token_budget = Number(tokenBudget);
    return body;
  }

  _hear(run, event) {
    const ours = event.tidaldecode ?? {};
    if (ours.selection_map) {
      const length = this.document ? this.document.text.length : 0;
      run.reading = new Reading(ours.selection_map, this._content, length);
    }
    if (ours.selection) run.reading.take(ours.selection);
    if (event.prompt_progress) {
      run.state = "reading";
      run.progress = event.prompt_progress;
    }
    if (event.usage) run.usage = event.usage;
    for (const choice of event.choices) {
      if (choice.finish_reason) run.finishReason = choice.finish_reason;
      const { content, reasoning_content: reasoning } = choice.delta;
      if (!content && !reasoning) continue;
      const now = performance.now();
      if (run.numPieces === 0) run.firstAt = now;
      run.lastAt = now;
      run.state = "writing";
      run.text += content ?? "";
      run.reasoning += reasoning ?? "";
      run.numPieces++;
    }
    this.changed();
  }
}

function newRun(mode) {
  return {
    mode,
    state: "queued", // waiting, reading, writing, done, stopped or failed
    text: "",
    reasoning: "", // in front of it; no part of the next prompt
    problem: "",
    progress: null,
    usage: null,
    finishReason: "",
    reading: null,
    askedAt: 0,
    firstAt: 0,
    lastAt: 0,
    numPieces: 0, // of text, about one a token
  };
}

// The figures of a run as far as they are known: numbers, or null.
export function figures(run) {
  const steps = (run.usage ? run.usage.completion_tokens : run.numPieces) - 1;
  const ours = run.usage ? run.usage.tidaldecode : null;
  const perToken = run.reading ? run.reading.kvBytesPerToken : 0;
  // What is heard here may come bundled: the engine's clock is right, once it is known.
  const heardMs = (run.lastAt - run.firstAt) / steps;
  const msPerToken = ours ? 1000 / ours.decode_tokens_per_s : heardMs;
  return {
    firstTokenMs: run.firstAt ? run.firstAt - run.askedAt : null,
    msPerToken: steps > 0 && msPerToken > 0 ? msPerToken : null,
    tokensPerStep: ours && perToken && steps > 0 ? ours.kv_bytes_read / perToken / steps : null,
    promptTokens: run.reading ? run.reading.promptTokens : null,
    cachedTokens: run.usage ? run.usage.prompt_tokens_details.cached_tokens : null,
    accepted: ours && ours.acceptance_rate !== undefined ? ours.acceptance_rate : null,
  };
}
