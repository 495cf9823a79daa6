// The whole prompt as a strip: a row a bin, a column a choosing layer with its newest step, and a
// last one for all steps of the layer that the text is tinted by.
import { html, useEffect, useRef } from "./vendor/preact.js";

const GAP = 2; // pixels between columns

function draw(canvas, run) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth * ratio, canvas.clientHeight * ratio];
  if (canvas.width !== Math.round(width)) canvas.width = Math.round(width);
  if (canvas.height !== Math.round(height)) canvas.height = Math.round(height);
  const context = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  const [cool, warm] = [style.getPropertyValue("--map-cool"), style.getPropertyValue("--map-warm")];
  context.globalAlpha = 1;
  context.fillStyle = cool;
  context.fillRect(0, 0, canvas.width, canvas.height);
  const reading = run ? run.reading : null;
  if (!reading) return;
  const columns = [...reading.layers.entries()].sort(([a], [b]) => a - b).map(([, each]) => each);
  columns.push(reading.levels());
  const columnWidth = (canvas.width - GAP * ratio * (columns.length - 1)) / columns.length;
  const rowHeight = canvas.height / reading.numBins;
  context.fillStyle = warm;
  columns.forEach((shares, column) => {
    const left = column * (columnWidth + GAP * ratio);
    for (let bin = 0; bin < reading.numBins; bin++) {
      const share = run.mode === "full" ? 1 : shares[bin];
      if (share <= 0) continue;
      context.globalAlpha = 0.15 + 0.85 * Math.sqrt(Math.min(1, share));
      const top = Math.floor(bin * rowHeight);
      context.fillRect(left, top, columnWidth, Math.max(ratio, (bin + 1) * rowHeight - top));
    }
  });
}

function label(run) {
  if (!run || !run.reading) return "Map of the document: nothing has been read yet";
  if (run.mode === "full") return "Map of the document: dense decoding reads every token";
  const { numEvents, layers, layer } = run.reading;
  const names = [...layers.keys()].sort((a, b) => a - b).join(", ");
  if (numEvents === 0) return "Map of the document: no sparse step yet";
  return `Map of the document: what layers ${names} read in the newest step, and ${layer} in all`;
}

// jump: called with a bin that was clicked.
export function Minimap({ run, jump }) {
  const canvas = useRef(null);
  useEffect(() => draw(canvas.current, run));
  useEffect(() => {
    const again = () => draw(canvas.current, run);
    const watcher = new ResizeObserver(again);
    watcher.observe(canvas.current);
    return () => watcher.disconnect();
  }, [run]);
  const onClick = (event) => {
    if (!run || !run.reading) return;
    const share = event.offsetY / canvas.current.clientHeight;
    jump(Math.min(run.reading.numBins - 1, Math.floor(share * run.reading.numBins)));
  };
  return html`<canvas
    ref=${canvas} class="minimap" role="img" aria-label=${label(run)} title=${label(run)}
    onClick=${onClick}
  ></canvas>`;
}
