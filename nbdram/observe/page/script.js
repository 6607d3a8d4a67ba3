// The status page: asks once a second, and only while somebody looks.

import { Chart, DeviceMap, bytes, count, duration, el, rate, span, table } from "/charts.js";

const PERIOD_MS = 1000, SLOW_EVERY = 2, WINDOW = 10;
const $ = (id) => document.getElementById(id);
const TIERS = [["resident", "resident"], ["compressed", "compressed"], ["disk", "on disk"], ["remote", "remote"]];
const STACK = [{ key: "resident", label: "resident", color: "resident" }, { key: "compressed", label: "compressed", color: "compressed" }, { key: "disk", label: "on disk", color: "disk" }, { key: "remote", label: "remote", color: "remote" }];
const TRAFFIC = [{ key: "read_bytes", label: "read", color: "read" }, { key: "written_bytes", label: "written", color: "write" }];

let paused = false, ticks = 0, states = [], cards = new Map();

const charts = {
  throughput: new Chart($("chart-throughput"), "Throughput", TRAFFIC, { format: rate, base: 1024 }),
  requests: new Chart($("chart-requests"), "Requests and faults", [
    { key: "requests", label: "requests/s", color: "read" }, { key: "faults", label: "faults/s", color: "fault" },
  ], { format: count }),
  tiers: new Chart($("chart-tiers"), "Where the data is", STACK, { format: bytes, stacked: true, base: 1024 }),
};

const ask = async (path) => {
  const response = await fetch(path, { signal: AbortSignal.timeout(5000) });
  if (!response.ok) throw new Error(String(response.status));
  return response.json();
};

const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };

async function tick() {
  if (paused || document.hidden) return;
  try {
    const find = $("find").value.trim();
    const status = await ask(`/api/status${find ? `?find=${encodeURIComponent(find)}` : ""}`);
    if (states.length && status.uptime_s < states.at(-1).uptime_s) states = [];
    states.push(status);
    if (states.length > WINDOW) states.shift();
    showServer(status);
    showMemory(status);
    showLatency();
    showExports(status);
    showConnections(status);
    if (ticks++ % SLOW_EVERY === 0) await showCurves();
    $("problem").hidden = true;
    document.body.classList.remove("stale");
  } catch (error) {
    if (!(error instanceof TypeError || error.name === "TimeoutError" || /^\d+$/.test(error.message))) throw error;
    put($("problem"), "The server does not answer. Trying again every second; what you see is from before.");
    $("problem").hidden = false;
    document.body.classList.add("stale");
    setState("no answer", "bad");
    states = [];
  }
}

function setState(text, kind) {
  put($("state"), text);
  $("state").className = `state ${kind}`;
}

function showServer(status) {
  setState(status.ready ? "ready" : "starting or draining", status.ready ? "good" : "bad");
  put($("uptime"), `up ${span(status.uptime_s)}`);
  put($("version"), `nbdram ${status.version}`);
  document.title = `${bytes(status.memory.stored)} · nbdram`;
}

// -- memory ------------------------------------------------------------------------------------------

function showMemory({ memory, swap, remote, attach, exports }) {
  const ram = memory.resident + memory.compressed + memory.index;
  if (memory.stored) {
    put($("stored"), bytes(memory.stored));
    put($("stored-in"), `stored in ${bytes(ram)} of RAM` + (memory.disk ? `, ${bytes(memory.disk)} on disk` : "")
      + (memory.remote ? `, ${bytes(memory.remote)} in the memory of other machines` : ""));
  } else {
    put($("stored"), "Empty");
    put($("stored-in"), "nothing is stored yet");
  }
  put($("saying"), saying(memory, attach, exports));
  const parts = [
    ["overhead", "the server itself", memory.overhead], ["index", "index", memory.index],
    ["resident", "resident", memory.resident], ["compressed", "compressed", memory.compressed],
  ];
  bar($("budget"), parts, memory.limit);
  const share = Math.round((100 * memory.used) / memory.limit);
  $("budget").setAttribute("aria-label", `Memory budget: ${bytes(memory.used)} of ${bytes(memory.limit)} used, ${share} percent. `
    + parts.map(([, label, size]) => `${label} ${bytes(size)}`).join(", "));
  legend($("budget-legend"), [...parts, ["free", `free of ${bytes(memory.limit)}`, Math.max(0, memory.limit - memory.used)]]);
  const areas = swap.map(({ path, used, size, failing }) => {
    const made = el("div", {}, el("p", { className: "quiet", textContent:
      `Disk: ${bytes(used)} of ${bytes(size)} in ${path}${failing ? " — can’t be written to" : ""}` }),
      el("div", { className: "bar", role: "img", ariaLabel: `${bytes(used)} of ${bytes(size)} used` }));
    bar(made.lastChild, [["disk", "used", used]], size);
    return made;
  });
  if (remote) {
    areas.push(el("div", {}, el("p", { className: "quiet", textContent: `Remote: ${bytes(remote.used)}${remote.max ? ` of ${bytes(remote.max)}` : ""} in ${remote.url}${remote.failing ? " — a node takes nothing for now" : ""}` })));
    if (remote.max) {
      areas.at(-1).append(el("div", { className: "bar", role: "img", ariaLabel: `${bytes(remote.used)} of ${bytes(remote.max)} used` }));
      bar(areas.at(-1).lastChild, [["remote", "used", remote.used]], remote.max);
    }
  }
  $("swap").replaceChildren(...areas);
}

function saying(memory, attach, exports) {
  if (!memory.stored) {
    const unix = attach.find((endpoint) => endpoint.startsWith("unix:"));
    const name = exports[0]?.name ?? "NAME";
    return unix ? `Attach it with: nbd-client -unix ${unix.slice(5)} /dev/nbd0 -N ${name}` : "";
  }
  const said = [];
  const cold = memory.compressed_content + memory.disk_content + memory.remote_content;
  const taken = memory.compressed + memory.disk + memory.remote;
  if (cold) said.push(`${bytes(cold)} of cold data are compressed to ${bytes(taken)}, ${Math.round((100 * taken) / cold)} %`);
  else said.push("all of it is resident; nothing had to be compressed yet");
  if (memory.waiting) said.push(`${memory.waiting} writers wait for memory`);
  const sentence = `${said.join("; ")}.`;
  return sentence[0].toUpperCase() + sentence.slice(1);
}

function bar(root, parts, whole) {
  for (const [kind, , size] of parts) {
    let part = root.querySelector(`.tier-${kind}`);
    if (!part) root.append(part = el("i", { className: `tier-${kind}` }));
    part.style.width = `${Math.min(100, (100 * size) / whole)}%`;
    part.hidden = !size;
  }
}

function legend(root, items) {
  if (root.children.length !== items.length)
    root.replaceChildren(...items.map(([kind]) => el("li", { className: kind === "free" ? kind : `tier-${kind}` }, el("b"), el("span"))));
  items.forEach(([, label, size], i) => {
    put(root.children[i].children[0], bytes(size));
    put(root.children[i].children[1], label);
  });
}

// -- latency and curves ------------------------------------------------------------------------------

function showLatency() {
  const now = states.at(-1).latency_s, before = states[0].latency_s;
  const rows = [["read", "read"], ["write", "write"], ["fault", "read of cold data"], ["loop", "event loop late by"]].map(([key, label]) => {
    const fresh = states.length > 1 ? now[key].map((value, i) => Math.max(0, value - before[key][i])) : [];
    return [label, ...[0.5, 0.99].map((share) => { const at = percentile(fresh, now.bounds, share); return at === null ? "–" : `≤ ${duration(at)}`; })];
  });
  const made = table("Latency in the last ten seconds", ["", "half", "99 of 100"], rows);
  made.firstChild.className = "latency";
  $("latency").replaceChildren(made);
}

function percentile(counts, bounds, share) {
  const total = counts.reduce((a, b) => a + b, 0);
  let seen = 0;
  for (let i = 0; total && i < counts.length; i++) {
    seen += counts[i];
    if (seen >= share * total) return bounds[Math.min(i, bounds.length - 1)];
  }
  return null;
}

async function showCurves() {
  const { series, interval_s, points } = await ask("/api/history");
  for (const chart of Object.values(charts)) chart.update(series, interval_s, points);
  for (const card of cards.values()) if (card.root.open) await card.detail();
}

// -- exports -----------------------------------------------------------------------------------------

class Card {
  constructor(name) {
    this.name = name;
    this.root = $("export-template").content.cloneNode(true).firstElementChild;
    const find = (selector) => this.root.querySelector(selector);
    this.parts = { tags: find(".tags"), stored: find(".stored"), rates: find(".rates"), bar: find(".bar"), empty: find(".empty"),
      figure: find(".map"), facts: find(".facts"), legend: find(".map .legend") };
    put(find(".name"), name);
    this.map = new DeviceMap(this.parts.figure);
    this.charts = [
      new Chart(find(".chart-throughput"), `Throughput of ${name}`, TRAFFIC, { format: rate, base: 1024 }),
      new Chart(find(".chart-tiers"), `Where the data of ${name} is`, STACK, { format: bytes, stacked: true, base: 1024 }),
    ];
    this.root.addEventListener("toggle", () => this.root.open && this.detail().catch(() => {}));
    find(".map details").addEventListener("toggle", () => this.map.map && this.map.fillTable());
  }

  update(now, before, seconds) {
    const { tags, stored, rates, bar: tierBar, facts, empty, figure } = this.parts;
    const labels = [now.description, now.read_only ? "read-only" : "", now.connections === 1 ? "1 connection" : now.connections ? `${now.connections} connections` : ""];
    if (now.integrity_errors) labels.push(`${now.integrity_errors} damaged`);
    tags.replaceChildren(...labels.filter(Boolean).map((text) => el("span", { textContent: text, className: text.endsWith(" damaged") ? "bad" : "" })));
    put(stored, `${bytes(now.stored)} of ${bytes(now.size)}`);
    const per = (key) => (before && seconds > 0 ? Math.max(0, now[key] - before[key]) / seconds : 0);
    put(rates, `read ${rate(per("read_bytes"))} · written ${rate(per("written_bytes"))}`);
    const held = now.resident + now.compressed + now.disk + now.remote;
    bar(tierBar, TIERS.map(([key, label]) => [key, label, now[key]]), Math.max(1, held));
    tierBar.setAttribute("aria-label", TIERS.map(([key, label]) => `${bytes(now[key])} ${label}`).join(", "));
    if (!this.root.open) return;
    empty.hidden = Boolean(now.stored);
    figure.hidden = !now.stored;
    put(empty, `All ${bytes(now.size)} are a hole: nothing is stored here, and it costs nothing.`);
    legend(this.parts.legend, TIERS.map(([key, label]) => [key, label, now[key]]).filter(([, , size], i) => i < 2 || size));
    if (!this.parts.legend.querySelector(".heat")) {
      this.parts.legend.append(el("li", { className: "free" }, el("span", { textContent: "hole" })),
        el("li", { className: "heat" }, el("span", { textContent: "idle to touched lately" })));
    }
    const values = [["Requests", count(now.requests)], ["Read", bytes(now.read_bytes)], ["Written", bytes(now.written_bytes)],
      ["Faults from RAM", count(now.ram_faults)], ["Faults from disk", count(now.disk_faults)], ["Faults from the remote", count(now.remote_faults)], ["Errors", count(now.errors)]];
    facts.replaceChildren(...values.map(([term, value]) => el("div", {}, el("dt", { textContent: term }), el("dd", { textContent: value }))));
  }

  async detail() {
    const query = `?export=${encodeURIComponent(this.name)}`;
    const { series, interval_s, points } = await ask(`/api/history${query}`);
    for (const chart of this.charts) chart.update(series, interval_s, points);
    const map = await ask(`/api/map${query}`);
    if (map.cells) { this.parts.figure.hidden = false; this.map.update(map); }
  }
}

function showExports({ exports, export_count, matching_count }) {
  const first = states[0], seconds = states.at(-1).uptime_s - first.uptime_s;
  const before = new Map(first.exports.map((one) => [one.name, one]));
  const wanted = new Set(exports.map(({ name }) => name));
  for (const [name, card] of cards) if (!wanted.has(name)) { card.root.remove(); cards.delete(name); }
  exports.forEach((now, i) => {
    let card = cards.get(now.name);
    if (!card) {
      cards.set(now.name, card = new Card(now.name));
      if (exports.length <= 2) card.root.open = true;
    }
    if ($("exports").children[i] !== card.root) $("exports").insertBefore(card.root, $("exports").children[i] ?? null);
    card.update(now, before.get(now.name), seconds);
  });
  $("find-box").hidden = export_count <= 10;
  const note = !export_count ? "There are no exports." : !matching_count ? "No export has this in its name."
    : exports.length < matching_count ? `The ${exports.length} that hold most, of ${matching_count}.` : "";
  put($("exports-note"), note);
  $("exports-note").hidden = !note;
}

// -- connections -------------------------------------------------------------------------------------

function showConnections({ connections, connection_count }) {
  if (!connections.length) {
    $("connections").replaceChildren(el("p", { className: "quiet", textContent: "Nobody is connected." }));
    return;
  }
  const rows = connections.map(({ peer, export: name, replies, seconds }) => [peer, name, replies, span(seconds)]);
  const made = table("Open connections", ["Client", "Export", "Replies", "Since"], rows);
  if (connection_count > connections.length)
    made.append(el("p", { className: "quiet", textContent: `and ${connection_count - connections.length} more` }));
  $("connections").replaceChildren(made);
}

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  if (!paused) { states = []; tick(); }
});
document.addEventListener("visibilitychange", () => { states = []; tick(); });

const again = async () => { await tick(); setTimeout(again, PERIOD_MS); };
again();
