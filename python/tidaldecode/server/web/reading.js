// What the steps of one answer have read of the prompt, by bins.

// Places of a text in UTF-16 units, for places in characters that ascend.
function inUnits(text, offsets) {
  if (!/[\ud800-\udfff]/.test(text)) return offsets;
  let unit = 0;
  let character = 0;
  return offsets.map((offset) => {
    if (offset < character) unit = character = 0;
    for (; character < offset && unit < text.length; character++) {
      unit += text.codePointAt(unit) > 0xffff ? 2 : 1;
    }
    return unit;
  });
}

export class Reading {
  // map: of the stream. content: the first message, which begins with the document's text.
  constructor(map, content, documentLength) {
    this.numBins = map.edges.length - 1;
    this.edges = map.edges;
    this.promptTokens = map.prompt_tokens;
    this.kvBytesPerToken = map.kv_bytes_per_token;
    this.layers = new Map(); // layer -> share of each bin's positions that the newest step read
    this.totals = new Map(); // layer -> the sum of those over all events
    this.layer = null; // the one whose total counts: the last, unless another is asked for
    this.numEvents = 0;
    this.positions = 0; // of a set of the newest step, on average
    this.pieces = piecesOf(map, content, documentLength);
  }

  // Takes a selection event.
  take(selection) {
    this.positions = 0;
    for (const { layer, sets, bins, answer } of selection.layers) {
      const shares = new Float32Array(this.numBins);
      let count = answer;
      for (let bin = 0; bin < this.numBins; bin++) {
        count += bins[bin];
        shares[bin] = bins[bin] / (sets * (this.edges[bin + 1] - this.edges[bin]));
      }
      this.positions += count / sets / selection.layers.length;
      this.layers.set(layer, shares);
      if (!this.totals.has(layer)) this.totals.set(layer, new Float32Array(this.numBins));
      const total = this.totals.get(layer);
      for (let bin = 0; bin < this.numBins; bin++) total[bin] += shares[bin];
    }
    if (this.numEvents === 0) this.layer = Math.max(...this.layers.keys());
    this.numEvents++;
  }

  get total() {
    return this.totals.get(this.layer) ?? new Float32Array(this.numBins);
  }

  // How often each bin has been read by the chosen layer: 1 is the document's most read one, or the
  // prompt's if no document is known in it.
  levels() {
    const { total } = this;
    const own = this.pieces.filter(({ isOwn }) => isOwn).map(({ bin }) => total[bin]);
    const most = Math.max(1e-9, ...(own.length > 0 ? own : total.subarray(1)));
    return total.map((sum, bin) => (bin === 0 ? 0 : Math.min(1, sum / most)));
  }

  // The document's bins that have been read most, without the neighbours of one that is in.
  passages(count) {
    const { total } = this;
    const byTotal = this.pieces
      .filter(({ bin, isOwn }) => isOwn && total[bin] > 0)
      .sort((a, b) => total[b.bin] - total[a.bin]);
    const found = [];
    for (const piece of byTotal) {
      if (found.length === count) break;
      if (found.every((other) => Math.abs(other.bin - piece.bin) > 1)) found.push(piece);
    }
    return found;
  }
}

// The bins that the document lies in: {bin, start, end, isOwn} in UTF-16 units of its text. Two of
// them are not its own: the first, for a prompt's first tokens are in every set, and one that holds
// the beginning of the question as well.
function piecesOf(map, content, documentLength) {
  const numBins = map.edges.length - 1;
  const firstOther = map.messages.findIndex((message) => message !== 0);
  const numEdges = firstOther < 0 ? map.edges.length : firstOther;
  const places = inUnits(content, map.offsets.slice(0, numEdges));
  const pieces = [];
  for (let bin = 0; bin < Math.min(numBins, numEdges); bin++) {
    const start = pieces.length === 0 ? 0 : places[bin];
    const next = bin + 1 < numEdges ? places[bin + 1] : Infinity;
    const end = Math.min(next, documentLength);
    if (start < end) pieces.push({ bin, start, end, isOwn: bin > 0 && next <= documentLength });
  }
  return pieces;
}
