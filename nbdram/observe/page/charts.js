// Curves of the last ten minutes, and maps of devices.

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 600, HEIGHT = 132, MIN_POINTS = 31;

export const el = (name, properties = {}, ...children) => {
  const made = document.createElement(name);
  const { dataset, ...rest } = properties;
  Object.assign(made, rest);
  Object.assign(made.dataset, dataset || {});
  made.append(...children);
  return made;
};

const svg = (name, attributes) => {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};

/** 1536 -> "1.5 KiB": three figures at most. */
export const bytes = (count) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (count >= 1023.5 && unit < units.length - 1) { count /= 1024; unit++; }
  return `${figures(count, unit > 0)} ${units[unit]}`;
};
export const rate = (count) => `${bytes(count)}/s`;
export const count = (number) => {
  const units = ["", "k", "M", "G", "T"];
  let unit = 0;
  while (number >= 999.5 && unit < units.length - 1) { number /= 1000; unit++; }
  return `${figures(number, unit > 0)}${units[unit]}`;
};
const figures = (number, decimals) => {
  if (!decimals || Number.isInteger(number)) return String(Math.round(number));
  return number < 9.95 ? number.toFixed(1) : String(Math.round(number));
};
export const duration = (seconds) => {
  if (seconds === null) return "–";
  if (seconds < 0.001) return `${figures(seconds * 1e6, true)} µs`;
  if (seconds < 1) return `${figures(seconds * 1e3, true)} ms`;
  return `${figures(seconds, true)} s`;
};
export const span = (seconds) => {
  const parts = [[86400, "d"], [3600, "h"], [60, "min"]];
  for (const [length, unit] of parts) if (seconds >= length) return `${Math.floor(seconds / length)} ${unit}`;
  return `${Math.floor(seconds)} s`;
};

/** The next larger number that reads well on a scale. */
const niceTop = (value, base) => {
  if (value <= 0) return base === 1024 ? 1024 : 10;
  const power = base === 1024 ? 2 ** Math.floor(Math.log2(value)) : 10 ** Math.floor(Math.log10(value));
  const steps = base === 1024 ? [1, 1.25, 1.5, 2] : [1, 1.5, 2, 3, 5, 10];
  return power * steps.find((step) => step * power >= value);
};

/** A chart of some series: `series` is [{key, label, color}], `format` makes a value readable. */
export class Chart {
  constructor(root, title, series, { format, stacked = false, base = 1000 }) {
    Object.assign(this, { title, series, format, stacked, base, values: {}, at: null });
    this.scale = el("span", { className: "scale", ariaHidden: "true" });
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", tabindex: "0" });
    for (const y of [0, 0.5, 1])
      this.svg.append(svg("line", { class: "grid-line", x1: 0, x2: WIDTH, y1: y * HEIGHT, y2: y * HEIGHT }));
    this.group = svg("g", { class: stacked ? "stacked" : "" });
    this.paths = series.map(({ color }) => {
      const area = svg("path", { class: "area" }), line = svg("path", { class: "line" });
      area.style.fill = `var(--${color})`;
      line.style.stroke = stacked ? "none" : `var(--${color})`;
      this.group.append(area, line);
      return { area, line };
    });
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
    this.svg.append(this.group, this.cursor);
    this.legend = el("ul", { className: "legend" });
    this.items = series.map(({ label, color }) => {
      const item = el("li", {}, el("b"), label);
      item.style.setProperty("--swatch", `var(--${color})`);
      this.legend.append(item);
      return item;
    });
    this.shown = this.items.map((item) => item.firstChild);
    this.ago = el("span");
    const times = el("div", { className: "times", ariaHidden: "true" }, this.ago, el("span", { textContent: "now" }));
    root.replaceChildren(el("div", { className: "chart" }, this.scale, this.svg, times, this.legend));
    this.svg.addEventListener("pointermove", (event) => {
      const box = this.svg.getBoundingClientRect();
      this.point((event.clientX - box.left) / box.width);
    });
    this.svg.addEventListener("pointerleave", () => this.point(null));
    this.svg.addEventListener("blur", () => this.point(null));
    this.svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -0.01, ArrowRight: 0.01 }[event.key];
      if (step) { event.preventDefault(); this.point(Math.min(1, Math.max(0, (this.at ?? 1) + step))); }
      if (event.key === "Escape") this.point(null);
    });
  }

  /** Show `values`, {key: [number...]}, the last of them of now, one every `interval` seconds, at most `points`. */
  update(values, interval, points) {
    const length = values[this.series[0].key].length;
    points = Math.min(points, Math.max(length, MIN_POINTS)); // a young server fills the width, too
    Object.assign(this, { values, interval, points });
    const below = new Array(length).fill(0);
    const tops = this.series.map(({ key }) => values[key].map((value, i) => {
      if (!this.stacked) return value;
      return (below[i] += value);
    }));
    const top = niceTop(Math.max(0, ...tops.flat()), this.base);
    this.scale.textContent = this.format(top);
    this.ago.textContent = `${span(points * interval)} ago`;
    const x = (i) => (WIDTH * (points - length + i)) / (points - 1);
    const y = (value) => HEIGHT - (HEIGHT * value) / top;
    this.paths.forEach(({ area, line }, number) => {
      const upper = tops[number].map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`);
      const lower = this.stacked && number ? tops[number - 1] : null;
      const back = lower ? lower.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).reverse()
        : [`${WIDTH},${HEIGHT}`, `${x(0).toFixed(1)},${HEIGHT}`];
      area.setAttribute("d", length ? `M${upper.join("L")}L${back.join("L")}Z` : "");
      line.setAttribute("d", length ? `M${upper.join("L")}` : "");
    });
    // Tiers that nobody has set up are not worth a word.
    this.items.forEach((item, i) => { item.hidden = this.stacked && i > 1 && !values[this.series[i].key].some(Boolean); });
    this.point(this.at);
    const said = this.series.map(({ key, label }) => {
      const all = values[key];
      return all.length ? `${label}: now ${this.format(all.at(-1))}, at most ${this.format(Math.max(...all))}` : "";
    });
    this.svg.setAttribute("aria-label", `${this.title}, last ${span(points * interval)}. ${said.join(". ")}`);
  }

  /** Show the values at a share of the width, or the latest ones. */
  point(at) {
    this.at = at;
    const length = this.values[this.series[0].key]?.length ?? 0;
    let index = length - 1;
    if (at !== null && length) {
      index = Math.max(0, Math.round(at * (this.points - 1)) - (this.points - length));
      const x = (WIDTH * (this.points - length + index)) / (this.points - 1);
      this.cursor.setAttribute("x1", x);
      this.cursor.setAttribute("x2", x);
    }
    this.cursor.setAttribute("visibility", at !== null && length ? "visible" : "hidden");
    this.series.forEach(({ key }, i) => {
      this.shown[i].textContent = length ? this.format(this.values[key][index]) : "–";
    });
  }
}

const MAP_TIERS = ["resident", "compressed", "disk", "remote"], CELL = MAP_TIERS.length + 1;

/** The map of a device on a canvas: a square for each part of it, with the colour of the tier that has most of it. */
export class DeviceMap {
  constructor(figure) {
    this.canvas = figure.querySelector("canvas");
    this.readout = figure.querySelector(".readout");
    this.table = figure.querySelector(".map-table");
    this.cell = null;
    this.canvas.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left) / this.pitch);
      this.show(Math.floor((event.clientY - box.top) / this.pitch) * this.columns + column);
    });
    this.canvas.addEventListener("pointerleave", () => this.show(null));
    this.canvas.addEventListener("blur", () => this.show(null));
    this.canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns }[event.key];
      if (step) {
        event.preventDefault();
        this.show(Math.min(this.count - 1, Math.max(0, (this.cell ?? -step) + step)));
      }
    });
    new ResizeObserver(() => this.map && this.draw()).observe(this.canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.map && this.draw());
  }

  update(map) {
    this.map = map;
    this.cells = Uint8Array.from(atob(map.cells), (character) => character.charCodeAt(0));
    this.count = this.cells.length / CELL;
    this.draw();
    const summary = this.summary();
    const shares = Object.entries(summary).map(([tier, size]) => `${bytes(size)} ${tier}`).join(", ");
    this.canvas.setAttribute("aria-label", `Map of the device: of what is drawn, ${shares}. Arrow keys read it part by part.`);
    if (this.table.closest("details").open || !this.table.firstChild) this.fillTable();
    this.show(this.cell);
  }

  draw() {
    const width = this.canvas.parentElement.clientWidth;
    if (!width) return;
    const style = getComputedStyle(this.canvas);
    const color = Object.fromEntries([...MAP_TIERS, "track", "card", "ink"].map((name) => [name, rgb(style.getPropertyValue(`--${name}`))]));
    // Squares that fill the width, and of a height that a screen has.
    this.pitch = Math.max(5, Math.min(22, Math.sqrt((width * 200) / Math.max(1, this.count))));
    this.columns = Math.max(1, Math.floor(width / this.pitch));
    this.pitch = width / this.columns;
    const rows = Math.ceil(this.count / this.columns), scale = devicePixelRatio || 1;
    const height = Math.ceil(rows * this.pitch);
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const gap = this.pitch > 8 ? 1.5 : 1;
    for (let i = 0; i < this.count; i++) {
      const parts = [...this.cells.subarray(CELL * i, CELL * i + MAP_TIERS.length)], heat = this.cells[CELL * i + CELL - 1] / 255;
      const filled = Math.min(1, parts.reduce((sum, part) => sum + part, 0) / 255);
      let fill = color.track;
      if (filled) {
        const tier = color[MAP_TIERS[parts.indexOf(Math.max(...parts))]];
        fill = mix(color.track, tier, (0.4 + 0.6 * heat) * (0.45 + 0.55 * filled));
      }
      const x = (i % this.columns) * this.pitch, y = Math.floor(i / this.columns) * this.pitch;
      context.fillStyle = `rgb(${fill.join(" ")})`;
      context.beginPath();
      context.roundRect(x, y, this.pitch - gap, this.pitch - gap, Math.min(3, this.pitch / 5));
      context.fill();
      if (i === this.cell) { context.strokeStyle = `rgb(${color.ink.join(" ")})`; context.lineWidth = 2; context.stroke(); }
    }
  }

  /** Say what is in a cell. */
  show(cell) {
    const changed = this.cell !== cell;
    this.cell = cell !== null && cell < this.count ? cell : null;
    if (changed) this.draw();
    if (this.cell === null) {
      const left = this.map.size - this.map.spans.reduce((sum, [start, end]) => sum + end - start, 0);
      this.readout.textContent = `Each square is ${bytes(this.map.cell_bytes)} of the device.`
        + (left > 0 ? ` ${bytes(left)} were never written and are not drawn.` : "")
        + (this.map.complete ? "" : " The device is scattered so much that its end is not drawn.");
      return;
    }
    const { start, parts, heat } = this.describe(this.cell);
    const said = parts.map(([tier, share]) => `${Math.round(share * 100)} % ${tier}`).join(", ") || "a hole";
    this.readout.textContent = `From ${bytes(start)}: ${said}${parts.length ? `; ${Math.round(heat * 100)} % of it touched lately` : ""}`;
  }

  describe(i) {
    let left = i * this.map.cell_bytes, start = 0;
    for (const [first, after] of this.map.spans) {
      start = first + left;
      if (start < after) break;
      left -= after - first;
    }
    const parts = MAP_TIERS.map((tier, t) => [tier, this.cells[CELL * i + t] / 255]).filter(([, share]) => share);
    return { start, parts, heat: this.cells[CELL * i + CELL - 1] / 255 };
  }

  summary() {
    const sums = MAP_TIERS.map(() => 0);
    for (let i = 0; i < this.count; i++) for (let t = 0; t < sums.length; t++) sums[t] += this.cells[CELL * i + t];
    return Object.fromEntries(MAP_TIERS.map((tier, t) => [tier, (sums[t] / 255) * this.map.cell_bytes]));
  }

  /** The same as a table: neighbouring squares that are alike are one row. */
  fillTable() {
    const rows = [];
    for (let i = 0; i < this.count; i++) {
      const { start, parts } = this.describe(i);
      const most = parts.length ? parts.reduce((a, b) => (b[1] > a[1] ? b : a))[0] : "hole";
      const last = rows.at(-1);
      if (last && last.most === most) last.cells++;
      else rows.push({ start, most, cells: 1 });
    }
    const shown = rows.slice(0, 200).map(({ start, most, cells }) => [bytes(start), bytes(cells * this.map.cell_bytes), most]);
    this.table.replaceChildren(table("What is where", ["From", "Length", "Mostly"], shown));
    if (rows.length > 200) this.table.append(el("p", { className: "quiet", textContent: `and ${rows.length - 200} more rows` }));
  }
}

export const table = (caption, heads, rows) => {
  const head = el("tr", {}, ...heads.map((text) => el("th", { scope: "col", textContent: text })));
  const body = rows.map(([first, ...rest]) => el("tr", {}, el("th", { scope: "row", textContent: first }),
    ...rest.map((text) => el("td", { textContent: text }))));
  const made = el("table", {}, el("caption", { className: "off-screen", textContent: caption }),
    el("thead", {}, head), el("tbody", {}, ...body));
  return el("div", { className: "scroller" }, made);
};

const rgb = (text) => text.trim().match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));
const mix = (from, to, share) => from.map((value, i) => Math.round(value + (to[i] - value) * share));
