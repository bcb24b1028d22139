"use strict";
(() => {
  // Names come from files that anybody may have written: they become text nodes only, never markup.
  const page = JSON.parse(document.getElementById("data").textContent);
  const PANELS = 12, ROWS = 100, MANY = 60;
  const state = { filters: {}, runs: "newest", hidden: new Set(), baseline: page.baseline, panels: PANELS, axis: "", way: "" };
  const byId = (id) => document.getElementById(id);

  // What the page shows

  function decoded() {
    const names = Object.keys(page.cells);
    const values = names.map((name) => {
      const column = page.cells[name];
      return Array.isArray(column) ? column : column.codes.map((code) => column.values[code]);
    });
    return values[0].map((_, i) => {
      const cell = {};
      names.forEach((name, j) => { cell[name] = values[j][i]; });
      const panel = page.panels[cell.panel_order];
      return Object.assign(cell, panel, { panel: panel.title, filled: !cell.peer });
    });
  }
  const cells = decoded();

  function withRatios(rows) {
    const least = new Map();
    for (const row of cells) if (row.backend === state.baseline && row.rank !== null) least.set(row.panel_order, row.query_s);
    for (const row of rows) {
      const base = least.get(row.panel_order);
      row.ratio = base && row.query_s && row.rank !== null ? base / row.query_s : null;
    }
    return rows;
  }

  const isShown = (row) =>
    Object.entries(state.filters).every(([name, value]) => value === "" || String(row[name]) === value) &&
    (state.runs === "all" || (state.runs === "newest" ? row.is_current : row.run === state.runs)) &&
    !state.hidden.has(row.backend);

  // Text of values

  const significant = (value, digits) => Number(value.toPrecision(digits)).toLocaleString("en-US", { maximumSignificantDigits: digits });
  function seconds(value) {
    if (value === null || value === undefined) return "";
    if (value >= 1) return significant(value, value < 1000 ? 3 : 6) + " s";
    return value >= 1e-3 ? significant(value * 1e3, 3) + " ms" : significant(value * 1e6, 3) + " µs";
  }
  const number = (value) => (value === null || value === undefined ? "" : value >= 1000 ? Math.round(value).toLocaleString("en-US") : significant(value, 3));
  const whole = (value) => (value === null || value === undefined ? "" : value.toLocaleString("en-US"));
  const error = (value) => (value === null || value === undefined ? "" : value === 0 ? "0" : value.toExponential(1));
  const percent = (value) => (value === null || value === undefined ? "" : significant(100 * value, 2) + " %");
  const factor = (value) => (value === null || value === undefined ? "" : significant(value, 3) + "×");
  const megabytes = (value) => (value === null || value === undefined ? "" : value < 1e6 ? "< 1" : Math.round(value / 1e6).toLocaleString("en-US"));
  const plain = (value) => (value === null || value === undefined ? "" : String(value));

  // Elements

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key in made && typeof value !== "string") made[key] = value; else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  const SHAPES = {
    circle: "M 1 0 A 1 1 0 1 1 -1 0 A 1 1 0 1 1 1 0 Z", square: "M -.9 -.9 H .9 V .9 H -.9 Z", diamond: "M 0 -1.1 L .85 0 L 0 1.1 L -.85 0 Z",
    cross: "M -1 -.35 H -.35 V -1 H .35 V -.35 H 1 V .35 H .35 V 1 H -.35 V .35 H -1 Z",
    "triangle-up": "M 0 -1 L 1 .8 H -1 Z", "triangle-down": "M 0 1 L 1 -.8 H -1 Z",
    "triangle-right": "M 1 0 L -.8 1 V -1 Z", "triangle-left": "M -1 0 L .8 1 V -1 Z",
  };
  function swatch(backend) {
    const look = page.looks[backend] || { colour: "#7b8088", shape: "circle", filled: true };
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    for (const [key, value] of Object.entries({ viewBox: "-1.5 -1.5 3 3", width: 16, height: 16, class: "swatch", "aria-hidden": "true" })) svg.setAttribute(key, value);
    for (const [key, value] of Object.entries({ d: SHAPES[look.shape], fill: look.colour, "fill-opacity": look.filled ? 1 : 0.1, stroke: look.colour, "stroke-width": 0.3 })) path.setAttribute(key, value);
    svg.append(path);
    return svg;
  }

  // Tables

  class SortedTable {
    constructor(id, columns, caption = "", limit = ROWS) {
      this.limit = limit;
      this.box = byId(id); this.columns = columns; this.caption = caption; this.sort = null; this.all = false; this.rows = [];
    }
    show(rows) { this.rows = rows; this.draw(); }
    ordered() {
      if (!this.sort) return this.rows;
      const { key, down } = this.sort;
      const sign = down ? -1 : 1;
      // What has no value comes last either way.
      return [...this.rows].sort((a, b) => {
        const x = a[key], y = b[key];
        const gapX = x === null || x === undefined || x === "", gapY = y === null || y === undefined || y === "";
        if (gapX || gapY) return gapX - gapY;
        return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true }));
      });
    }
    draw() {
      const focused = this.box.contains(document.activeElement) ? document.activeElement.dataset.key : null;
      const rows = this.ordered(), shown = this.all ? rows : rows.slice(0, this.limit);
      if (!rows.length) { this.box.replaceChildren(element("p", { class: "empty" }, "Nothing to show.")); return; }
      // The roles are those that the elements have; a phone's layout of blocks would take them away.
      const head = element("tr", { role: "row" });
      for (const column of this.columns) {
        const button = element("button", { type: "button", "data-key": column.key }, column.label);
        button.addEventListener("click", () => {
          const same = this.sort && this.sort.key === column.key;
          this.sort = { key: column.key, down: same ? !this.sort.down : false };
          this.draw();
        });
        const sorted = this.sort && this.sort.key === column.key ? (this.sort.down ? "descending" : "ascending") : "none";
        head.append(element("th", { scope: "col", role: "columnheader", class: column.number ? "number" : "", "aria-sort": sorted }, button));
      }
      const body = element("tbody", { role: "rowgroup" });
      for (const row of shown) {
        const line = element("tr", { role: "row" });
        this.columns.forEach((column, place) => {
          const text = (column.text || plain)(row[column.key], row);
          const kind = [column.number ? "number" : column.wide ? "text" : column.clipped ? "clipped" : "", column.bad && column.bad(row) ? "bad" : ""].join(" ").trim();
          const cell = element(place ? "td" : "th", place ? { role: "cell", class: kind } : { scope: "row", role: "rowheader", class: kind });
          if (column.key === "backend") cell.append(swatch(row.backend), " ");
          cell.append(text);
          if (column.clipped && text) cell.title = text;
          line.append(cell);
        });
        body.append(line);
      }
      const table = element("table", { role: "table" }, element("thead", { role: "rowgroup" }, head), body);
      if (this.caption) table.prepend(element("caption", {}, this.caption));
      const label = this.caption || this.box.parentElement.querySelector("h2, h3").textContent;
      const parts = [element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label + ", table" }, table)];
      if (rows.length > shown.length) {
        const more = element("button", { type: "button", class: "more" }, `Show all ${whole(rows.length)} rows`);
        more.addEventListener("click", () => { this.all = true; this.draw(); });
        parts.push(more);
      }
      this.box.replaceChildren(...parts);
      if (focused) [...this.box.querySelectorAll("button")].find((button) => button.dataset.key === focused)?.focus();
    }
  }

  const varies = (name) => new Set(page.panels.map((panel) => panel[name])).size > 1;
  const caseColumns = [
    { key: "op", label: "op" }, { key: "metric", label: "metric" }, { key: "dtype", label: "dtype" }, { key: "dataset", label: "data set" },
    { key: "size", label: "queries x corpus x features" }, { key: "k", label: "k", number: true }, { key: "threads", label: "threads", number: true },
    { key: "machine", label: "machine" }, { key: "started", label: "run" }, { key: "commit", label: "commit" },
  ].filter((column) => ["metric", "dtype"].includes(column.key) || varies(column.key));
  const isBad = (row) => !["ok", "absent", "unsupported"].includes(row.status);
  const cellColumns = [
    { key: "backend", label: "backend", text: (value, row) => value + (row.peer ? " (peer)" : "") }, ...caseColumns,
    { key: "rank", label: "rank", number: true, text: (value, row) => (row.is_fastest ? "= " : "") + plain(value) },
    { key: "query_s", label: "time/query", number: true, text: seconds }, { key: "ratio", label: "× baseline", number: true, text: factor },
    { key: "status", label: "status", bad: isBad, text: (value, row) => value + (row.complete ? "" : ", interrupted") },
    { key: "low_s", label: "from", number: true, text: seconds }, { key: "high_s", label: "to", number: true, text: seconds },
    { key: "queries_per_s", label: "queries/s", number: true, text: number }, { key: "error", label: "error", number: true, text: error },
    { key: "recall", label: "recall", number: true, text: (value) => (value === null ? "" : significant(value, 4)) },
    { key: "limit_share", label: "of limit", number: true, text: percent }, { key: "bound", label: "limit" },
    { key: "import_s", label: "import", number: true, text: seconds }, { key: "prepare_s", label: "prepare", number: true, text: seconds },
    { key: "first_call_s", label: "first call", number: true, text: seconds }, { key: "copy_in_s", label: "copy in", number: true, text: seconds },
    { key: "compute_s", label: "compute", number: true, text: seconds }, { key: "copy_out_s", label: "copy out", number: true, text: seconds },
    { key: "peak_bytes", label: "peak MB", number: true, text: megabytes }, { key: "peak_device_bytes", label: "device MB", number: true, text: megabytes },
    { key: "n_samples", label: "calls", number: true, text: whole }, { key: "measured_queries", label: "queries timed", number: true, text: whole },
    { key: "measured_corpus", label: "rows timed", number: true, text: whole }, { key: "noise", label: "noise", number: true, text: percent },
    { key: "contention", label: "contention", number: true, text: percent }, { key: "library", label: "version" }, { key: "reason", label: "reason", clipped: true },
  ].filter((column) => cells.some((cell) => { const value = cell[column.key]; return column.key === "ratio" || (value !== null && value !== undefined && value !== ""); }));

  const tables = {
    glance: new SortedTable("table-glance", [
      { key: "panel", label: "case" }, { key: "names", label: "fastest" }, { key: "query_s", label: "time/query", number: true, text: seconds },
      { key: "queries_per_s", label: "queries/s", number: true, text: number }, { key: "ratio", label: "× baseline", number: true, text: factor },
      { key: "next", label: "next" }, { key: "lead", label: "next / fastest", number: true, text: factor },
      { key: "limit_share", label: "of limit", number: true, text: percent }, { key: "error", label: "error", number: true, text: error },
      { key: "noise", label: "noise", number: true, text: percent },
    ], "Fastest of each case", PANELS),
    unranked: new SortedTable("table-unranked", [
      { key: "backend", label: "backend" }, { key: "status", label: "status", bad: isBad }, { key: "where", label: "where", wide: true }, { key: "reason", label: "reason", wide: true },
    ]),
    cells: new SortedTable("table-cells", cellColumns),
  };

  function glance(rows) {
    return panelsOf(rows).map((group) => {
      const ranked = group.filter((row) => row.rank !== null).sort((a, b) => a.rank - b.rank);
      if (!ranked.length) return null;
      const first = ranked[0], alike = ranked.filter((row) => row === first || (row.is_fastest && first.is_fastest)), next = ranked.find((row) => !alike.includes(row));
      return { ...first, names: alike.map((row) => row.backend).join(" = "), next: next ? next.backend : "", lead: next ? next.query_s / first.query_s : null };
    }).filter(Boolean);
  }

  function unranked(rows) {
    const groups = new Map();
    for (const row of rows) {
      if (row.rank !== null) continue;
      const key = JSON.stringify([row.backend, row.status, row.reason]);
      if (!groups.has(key)) groups.set(key, { backend: row.backend, status: row.status, reason: row.reason, panels: [] });
      groups.get(key).panels.push(row.panel);
    }
    const all = panelsOf(rows).length;
    return [...groups.values()].map((group) => ({
      ...group, where: group.panels.length === all && all > 1 ? `all ${all} cases` : group.panels.length > 4 ? `${group.panels.length} of ${all} cases` : group.panels.join("; "),
    }));
  }

  function panelsOf(rows) {
    const groups = new Map();
    for (const row of rows) { if (!groups.has(row.panel_order)) groups.set(row.panel_order, []); groups.get(row.panel_order).push(row); }
    return [...groups.values()];
  }

  // Charts. Each: the rows it is given; the pixels before all facets (lead), and, of those beside each, the ones that
  // labels take; whether it has a legend; and what it says in words.

  const named = (list) => (list.length > 6 ? list.slice(0, 6).join("; ") + `; and ${list.length - 6} more` : list.join("; ")) + ".";
  const fastestIn = (rows) => named(glance(rows).map((row) => `${row.panel}: fastest ${row.names}, ${seconds(row.query_s)} a query`));
  const charts = {
    ranking: { rows: (rows) => rows, lead: 0, labels: 110, legend: false, words: (rows) => "Time for a query. " + fastestIn(rows) },
    accuracy: {
      rows: (rows) => rows.filter((row) => row.error !== null), lead: 62, labels: 0, legend: true,
      words: (rows) => "Queries a second against error. " + named(panelsOf(rows).map((group) => {
        const ranked = group.filter((row) => row.rank !== null).sort((a, b) => a.error - b.error || a.query_s - b.query_s);
        let best = 0;
        const front = ranked.filter((row) => row.queries_per_s > best && (best = row.queries_per_s));
        return `${group[0].panel}: on the front ${front.map((row) => `${row.backend} (error ${error(row.error)}, ${number(row.queries_per_s)} a second)`).join(", ")}`;
      })),
    },
    roofline: {
      rows: (rows) => rows.filter((row) => row.rank !== null && row.limit_rate && row.memory_rate), legend: true,
      words: (rows) => "Rate against arithmetic intensity. Nearest to the limit: " + named([...rows].sort((a, b) => b.limit_share - a.limit_share).slice(0, 6).map((row) => `${row.backend} on ${row.panel}, ${percent(row.limit_share)} of ${row.bound}`)),
    },
    scaling: {
      rows: scalingRows, lead: 62, labels: 0, legend: true,
      words: (rows) => `Time for all queries against ${page.axes[state.axis] || ""}. ` + named(panelsOf(rows).map((group) => `${group[0].panel}: fastest ` + group.filter((row) => row.rank === 1).sort((a, b) => a.x - b.x).map((row) => `${row.backend} at ${whole(row.x)}`).join(", "))),
    },
    phases: { rows: (rows) => rows.filter((row) => row.call_s !== null), lead: 0, labels: 110, legend: false, words: () => "Seconds of loading, preparing and the first call, stacked, for each backend. The values are in the table of all cells." },
    memory: { rows: (rows) => rows.filter((row) => row.peak_bytes !== null && row.call_s !== null), lead: 0, labels: 110, legend: false, words: () => "Peak memory of each backend. The values are in the table of all cells." },
    comparison: { rows: () => (page.comparison ? page.comparison.rows.filter((row) => row.ratio !== null).slice(0, MANY) : []), legend: false, words: (rows) => "Ratios of B to A. " + named(rows.map((row) => `${row.cell}: ${row.verdict}, ${significant(row.ratio, 3)}`)) },
    choices: {
      rows: () => (page.choices ? page.choices.rows.filter((row) => row.way === state.way) : []), lead: 62, labels: 0, legend: true,
      words: (rows) => `The fastest backend of ${rows.length} problems; for ${rows.filter((row) => row.regret > 1.02).length} of them another was chosen that took over 2 % longer.`,
    },
    accuracy_by_k: { rows: () => (page.classifiers ? page.classifiers.accuracy_by_k : []), legend: false, words: (rows) => "Right labels of the nearest-neighbour classifier. " + named(rows.map((row) => `${row.metric}, k = ${row.k}: ${significant(100 * row.accuracy, 4)} %`)) },
    loss_curves: { rows: () => (page.classifiers ? page.classifiers.loss_curves : []), legend: false, words: (rows) => `Best loss of the random search by iteration, ${new Set(rows.map((row) => row.seed)).size} seeds.` },
  };

  function scalingRows(rows) {
    const members = new Map(panelsOf(rows).map((group) => [group[0].panel_order, group]));
    const found = [];
    page.scaling.filter((group) => group.axis === state.axis).forEach((group, order) => {
      const there = group.panels.filter((place) => members.has(place));
      if (there.length < 2) return;
      for (const place of there) for (const row of members.get(place)) {
        found.push({ ...row, panel: group.title, panel_order: order, x: row[state.axis], total_s: row.query_s === null ? null : row.query_s * row.n_queries });
      }
    });
    return found.filter((row) => row.rank !== null);
  }

  // Vega keeps groups in plain objects, where these names are taken.
  const harmless = (text) => (text in Object.prototype ? "\u200b" + text : text);
  function inLines(text, letters) {
    const lines = [""];
    for (const word of (text || "").replaceAll(" x ", "\u00a0x\u00a0").split(" ")) {
      if (lines.at(-1) && lines.at(-1).length + word.length >= letters) lines.push("");
      lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
    }
    return lines.join("\n");
  }

  let turn = 0;
  async function draw(name, rows, mine) {
    const chart = charts[name], figure = byId("chart-" + name);
    let wanted = chart.rows(rows);
    const groups = panelsOf(wanted), isFaceted = Boolean(page.specs[name].facet);
    const isCut = isFaceted && groups.length > state.panels;
    if (isCut) wanted = groups.slice(0, state.panels).flat();
    if (!wanted.length) { figure.replaceChildren(element("p", { class: "empty" }, "Nothing to show for these filters.")); return; }
    const spec = structuredClone(page.specs[name]);
    let roofs = [];
    if (name === "roofline") {
      const places = new Set(wanted.map((row) => JSON.stringify([row.machine, row.threads])));
      roofs = page.roofs.filter((row) => places.has(JSON.stringify([row.machine, row.threads])));
    }
    const width = figure.clientWidth;
    if (isFaceted) {
      const beside = spec.spacing.column, fits = Math.floor((width - chart.lead) / (beside + 150));
      spec.columns = Math.max(1, Math.min(3, fits, isCut ? state.panels : groups.length));
      spec.spec.width = Math.min(420, Math.max(110, Math.floor((width - chart.lead) / spec.columns - beside)));
    } else spec.width = Math.max(180, Math.min(760, width - (name === "comparison" ? 300 : 130)));
    spec.description = chart.words(wanted);
    const letters = isFaceted ? Math.floor((spec.spec.width + spec.spacing.column - chart.labels) / 7.4) : 80;
    const shownRows = wanted.map((row) => ({ ...row, panel: inLines(harmless(row.panel), letters), backend: harmless(row.backend) }));
    spec.datasets = { roofs, rows: shownRows };
    // A facet leaves room for titles of two lines.
    if (isFaceted) spec.spacing.row += 15 * Math.max(0, Math.max(...shownRows.map((row) => row.panel.split("\n").length)) - 2);
    const isDark = document.documentElement.dataset.theme === "dark";
    const drawing = element("div", { class: "drawing" }), made = element("div");
    drawing.append(made);
    const parts = [drawing];
    if (chart.legend) {
      const names = [...new Set(wanted.map((row) => row.backend))].sort();
      parts.unshift(element("ul", { class: "legend", "aria-label": "Backends" }, ...names.map((backend) => element("li", {}, swatch(backend), " ", backend))));
    }
    if (isCut) {
      const more = element("button", { type: "button", class: "more" }, `${whole(state.panels)} of ${whole(groups.length)} shown: show ${PANELS} more`);
      more.addEventListener("click", () => { state.panels += PANELS; update(); });
      parts.push(more);
    }
    figure.style.minHeight = figure.offsetHeight + "px"; // so that the page does not jump while it is drawn anew
    figure.replaceChildren(...parts);
    const config = page.themes[isDark ? "dark" : "light"];
    const view = await vegaEmbed(made, spec, { renderer: "svg", mode: "vega-lite", config, tooltip: { theme: isDark ? "dark" : "light" }, actions: { export: true, source: false, compiled: false, editor: false }, downloadFileName: "knnbench-" + name });
    if (mine !== turn) view.finalize();
    figure.style.minHeight = "";
    // For who cannot see it, the picture is what it says in words; its hundreds of marks are in the table.
    const svg = made.querySelector("svg");
    if (svg) {
      svg.setAttribute("role", "img"); svg.setAttribute("aria-label", spec.description);
      for (const part of svg.children) part.setAttribute("aria-hidden", "true");
    }
  }

  async function drawAll(rows) {
    const mine = ++turn;
    document.documentElement.dataset.drawn = "";
    for (const name of Object.keys(charts)) {
      if (byId("chart-" + name).closest("section").hidden) continue;
      if (mine !== turn) return;
      try {
        await draw(name, rows, mine);
      } catch (failure) { // the other charts, and all tables, are worth having
        console.error(failure);
        byId("chart-" + name).replaceChildren(element("p", { class: "empty" }, "This chart could not be drawn; its values are in the table of all cells."));
      }
      await new Promise((done) => setTimeout(done));
    }
    if (mine === turn) document.documentElement.dataset.drawn = "all";
  }

  function searched(rows) {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    return rows.filter((row) => { const text = cellColumns.map((column) => plain(row[column.key])).join(" ").toLowerCase(); return words.every((word) => text.includes(word)); });
  }

  let shown = [];
  function update() {
    shown = withRatios(cells.filter(isShown));
    byId("count").textContent = `${whole(shown.length)} of ${whole(cells.length)} cells`;
    for (const node of document.querySelectorAll(".baseline")) node.textContent = state.baseline || "the baseline";
    tables.glance.show(glance(shown));
    tables.unranked.show(unranked(shown));
    tables.cells.show(searched(shown));
    drawAll(shown);
  }

  // Controls

  function select(name, label, options, value, changed) {
    const made = element("select", { id: "filter-" + name }, ...options.map(([key, text]) => element("option", { value: key, selected: key === value }, text)));
    made.addEventListener("change", () => { state.panels = PANELS; changed(made.value); update(); });
    return element("label", {}, label, made);
  }

  function controls() {
    const form = byId("controls");
    form.addEventListener("submit", (event) => event.preventDefault());
    const filters = { op: "Operation", dataset: "Data set", metric: "Metric", dtype: "dtype", size: "Size", k: "k", threads: "Threads", machine: "Machine", commit: "Commit" };
    for (const [name, label] of Object.entries(filters)) {
      const values = [...new Set(page.panels.map((panel) => String(panel[name])))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
      if (values.length < 2) continue;
      state.filters[name] = "";
      const options = [["", "all"], ...values.map((value) => [value, value === "null" ? "none" : value || "not known"])];
      form.append(select(name, label, options, "", (value) => { state.filters[name] = value; }));
    }
    const runs = new Map(page.panels.map((panel) => [panel.run, panel.started || panel.run]));
    if (runs.size > 1) form.append(select("runs", "Runs", [["newest", "newest of each backend"], ["all", "all"], ...runs], "newest", (value) => { state.runs = value; }));
    const backends = page.backends;
    form.append(select("baseline", "Baseline", backends.map((name) => [name, name]), state.baseline, (value) => { state.baseline = value; }));
    const boxes = backends.map((name) => {
      const box = element("input", { type: "checkbox", checked: true, value: name, name: "backend" });
      box.addEventListener("change", () => { if (box.checked) state.hidden.delete(name); else state.hidden.add(name); update(); });
      return element("label", {}, box, swatch(name), name);
    });
    const all = element("button", { type: "button" }, "All"), none = element("button", { type: "button" }, "None");
    for (const [button, isOn] of [[all, true], [none, false]]) {
      button.addEventListener("click", () => {
        for (const box of form.querySelectorAll("input[name=backend]")) { box.checked = isOn; if (isOn) state.hidden.delete(box.value); else state.hidden.add(box.value); }
        update();
      });
    }
    form.append(element("fieldset", {}, element("legend", {}, "Backends"), ...boxes, all, none));
    byId("search").addEventListener("input", () => tables.cells.show(searched(shown)));
    byId("csv").addEventListener("click", saveCsv);
    if (window.matchMedia("(max-width: 640px)").matches) byId("filters").open = false;
  }

  function saveCsv() {
    const columns = ["op", "metric", "dataset", "dtype", "k", "n_queries", "n_corpus", "n_features", "threads", "machine", "commit", "run", "started", ...Object.keys(page.cells).filter((name) => name !== "panel_order"), "ratio"];
    // A spreadsheet takes what begins with one of these for a formula.
    const text = (value) => { const raw = plain(value), safe = typeof value === "string" && /^[=+\-@\t\r]/.test(raw) ? "'" + raw : raw; return /[",\n\r]/.test(safe) ? '"' + safe.replaceAll('"', '""') + '"' : safe; };
    const lines = [columns.join(","), ...searched(shown).map((row) => columns.map((name) => text(row[name])).join(","))];
    const link = element("a", { href: URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" })), download: "knnbench.csv" });
    link.click();
    URL.revokeObjectURL(link.href);
  }

  function theme() {
    const button = byId("theme"), wanted = window.matchMedia("(prefers-color-scheme: dark)");
    const set = (mode) => { document.documentElement.dataset.theme = mode; button.setAttribute("aria-pressed", String(mode === "dark")); };
    set(wanted.matches ? "dark" : "light");
    button.addEventListener("click", () => { set(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); drawAll(shown); });
    wanted.addEventListener("change", () => { set(wanted.matches ? "dark" : "light"); drawAll(shown); });
  }

  // Sections that do not depend on the filters

  function sections() {
    const axes = Object.keys(page.axes).filter((axis) => page.scaling.some((group) => group.axis === axis));
    const has = {
      roofline: page.roofs.length > 0, scaling: axes.length > 0, choices: Boolean(page.choices), comparison: Boolean(page.comparison), classifiers: Boolean(page.classifiers),
    };
    for (const section of document.querySelectorAll("main section")) {
      section.hidden = has[section.id] === false;
      if (!section.hidden) byId("sections").append(element("li", {}, element("a", { href: "#" + section.id }, section.querySelector("h2").textContent)));
    }
    state.axis = axes[0] || "";
    for (const axis of axes) byId("axis").append(element("option", { value: axis }, page.axes[axis]));
    byId("axis").addEventListener("change", () => { state.axis = byId("axis").value; draw("scaling", shown, turn); });
    if (has.choices) {
      const ways = [...new Set(page.choices.rows.map((row) => row.way))];
      state.way = ways[0];
      for (const way of ways) byId("way").append(element("option", { value: way }, way));
      byId("way").addEventListener("change", () => { state.way = byId("way").value; draw("choices", shown, turn); });
      new SortedTable("table-regret", [
        { key: "name", label: "chosen by" }, { key: "geometric_mean", label: "geometric mean", number: true, text: (value) => value.toFixed(3) },
        { key: "percentile_95", label: "95th percentile", number: true, text: (value) => value.toFixed(2) }, { key: "worst", label: "worst", number: true, text: (value) => value.toFixed(2) },
        { key: "best_share", label: "best or within 2 %", number: true, text: percent },
      ], "Regret").show(page.choices.summaries);
    }
    if (has.comparison) {
      byId("comparison-sides").textContent = page.comparison.sides;
      new SortedTable("table-comparison", [
        { key: "cell", label: "cell" }, { key: "a_s", label: "A, time/query", number: true, text: seconds }, { key: "b_s", label: "B, time/query", number: true, text: seconds },
        { key: "ratio", label: "B / A", number: true, text: (value) => (value === null ? "" : significant(value, 4)) }, { key: "low", label: "from", number: true, text: (value) => (value === null ? "" : significant(value, 4)) },
        { key: "high", label: "to", number: true, text: (value) => (value === null ? "" : significant(value, 4)) }, { key: "p", label: "p", number: true, text: (value) => (value === null ? "" : significant(value, 2)) },
        { key: "verdict", label: "verdict", bad: (row) => row.is_regression }, { key: "note", label: "note", wide: true },
      ], "Verdicts").show(page.comparison.rows);
    }
    if (has.classifiers) classifiers();
    new SortedTable("table-machines", page.machine_columns.map((key) => ({ key, label: key.replaceAll("_", " "), wide: ["libraries", "features", "os", "gpus"].includes(key) }))).show(page.machines);
    new SortedTable("table-runs", [
      { key: "started", label: "began" }, { key: "machine", label: "machine" }, { key: "threads", label: "threads", number: true }, { key: "commit", label: "commit" },
      { key: "version", label: "knnbench" }, { key: "cases", label: "cases", number: true }, { key: "cells", label: "cells", number: true }, { key: "noise", label: "largest noise", number: true, text: percent }, { key: "run", label: "name" },
    ]).show(page.runs);
  }

  function classifiers() {
    const found = page.classifiers;
    byId("classifiers-lead").textContent = found.lead;
    const image = (one, alt, kind) => element("img", { src: one.src, alt, title: alt, class: kind });
    byId("neighbours").append(element("h3", {}, found.neighbours_title), element("div", { class: "neighbours" }, ...found.neighbours.map((query) => element("figure", {},
      element("div", { class: "images" }, image(query, `query, a ${query.label}`, "query"), ...query.nearest.map((near, place) => image(near, `neighbour ${place + 1}, a ${near.label}, distance ${significant(near.distance, 4)}`, "near"))),
      element("figcaption", {}, `${query.is_right ? "✓ right" : "✗ wrong"}: a ${query.label}, taken for a ${query.predicted}`)))));
  }

  theme();
  sections();
  controls();
  update();
  let resized = 0, before = document.documentElement.clientWidth;
  window.addEventListener("resize", () => {
    clearTimeout(resized);
    // A phone's address bar changes the height only.
    resized = setTimeout(() => { if (document.documentElement.clientWidth !== before) { before = document.documentElement.clientWidth; drawAll(shown); } }, 200);
  });
})();
