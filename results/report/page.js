"use strict";
// Sorting, filtering, columns to choose, and the panel that a number opens. Texts enter the page as texts only
// (textContent), never as markup.
(() => {
  const SHAPES = "http://www.w3.org/2000/svg";
  const FIRST_CURVES = 8;
  const said = document.getElementById("said");
  const panel = document.getElementById("panel");
  const panelTitle = document.getElementById("panel-title");
  const panelBody = panel.querySelector(".body");

  function fill(made, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  }
  const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS(SHAPES, tag), attributes, children);
  const say = (text) => { said.textContent = text; };
  const text = (node) => node.textContent.trim();

  // ---- packed data: JSON, deflated, in base64; unpacked when first asked for
  const held = {};
  function unpack(name) {
    held[name] ??= (async () => {
      if (!("DecompressionStream" in window)) throw new Error("This browser can not unpack the page's data.");
      const letters = atob(document.getElementById(`data-${name}`).textContent);
      const bytes = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      return JSON.parse(await new Response(stream).text());
    })();
    return held[name];
  }
  function at(runs, name, index) {
    const column = runs[name];
    if (!column) return null;
    if (Array.isArray(column)) return column[index] ?? null;
    const place = column.of[index];
    return place === null || place === undefined ? null : column.values[place];
  }

  // ---- panel
  let opener = null;
  function open(title, ...children) {
    panelTitle.textContent = title;
    panelBody.replaceChildren(...children.filter((child) => child !== null));
    if (!panel.open) {
      opener = document.activeElement;
      panel.showModal();
    }
    panel.scrollTop = 0;
    panelTitle.focus();
  }
  panel.querySelector(".close").addEventListener("click", () => panel.close());
  panel.addEventListener("click", (event) => { if (event.target === panel) panel.close(); });
  panel.addEventListener("close", () => {
    panelBody.replaceChildren();
    opener?.focus();
  });

  async function copy(what, content) {
    try {
      await navigator.clipboard.writeText(content);
      say(`${what} copied.`);
      return true;
    } catch {
      const area = make("textarea", { readonly: true, "aria-label": what });
      area.value = content;
      open(what, make("p", {}, "This browser lets no page write to the clipboard here: copy the selected text."), area);
      area.focus();
      area.select();
      return false;
    }
  }
  function copier(name, what, content) {
    const button = make("button", { type: "button", class: "act" }, name);
    button.addEventListener("click", async () => {
      try {
        if (!(await copy(what, await content()))) return;
      } catch (error) {
        say(error.message);
        button.textContent = error.message;
        return;
      }
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = name; }, 1500);
    });
    return button;
  }

  // ---- tables
  const headings = (table) => [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const rowsOf = (body) => [...body.rows].filter((row) => !row.classList.contains("group"));
  const bodiesOf = (table) => [...table.tBodies];

  function sortable(table) {
    const first = new Map();
    let count = 0;
    for (const body of bodiesOf(table)) for (const row of rowsOf(body)) first.set(row, count++);
    headings(table).forEach((head, place) => {
      const title = text(head);
      const button = make("button", { type: "button", class: "sort" }, ...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const ways = place === 0 || title.includes("↓") ? ["ascending", "descending"] : ["descending", "ascending"];
        const way = [...ways, null][(ways.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
        headings(table).forEach((other) => other.removeAttribute("aria-sort"));
        if (way) head.setAttribute("aria-sort", way);
        const sign = way === "descending" ? -1 : 1;
        const value = (row) => {
          const given = row.cells[place].dataset.value;
          return given === undefined ? NaN : Number(given.replace("inf", "Infinity"));
        };
        const compare = (a, b) => {
          let order = 0;
          if (way && place === 0) {
            order = sign * text(a.cells[0]).localeCompare(text(b.cells[0]), undefined, { numeric: true });
          } else if (way) {
            const [x, y] = [value(a), value(b)];
            if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1; // holes last, either way
            order = Number.isNaN(x) || x === y ? 0 : sign * (x - y);
          }
          return order || first.get(a) - first.get(b);
        };
        for (const body of bodiesOf(table)) body.append(...rowsOf(body).sort(compare));
        const within = bodiesOf(table).length > 1 ? ", within each setting" : "";
        say(way ? `Sorted by ${title}, ${way}${within}.` : "In the order of the table.");
      });
    });
  }

  function filtering(table) {
    const bodies = bodiesOf(table).map((body) => {
      const group = body.querySelector(".group");
      const heading = group ? text(group) : "";
      return { body, rows: rowsOf(body).map((row) => [row, `${text(row.cells[0])} ${heading}`.toLowerCase()]) };
    });
    const output = make("output");
    const box = make("input", { type: "search", placeholder: "norm or setting", autocomplete: "off", spellcheck: "false" });
    box.addEventListener("input", () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      let all = 0;
      for (const { body, rows } of bodies) {
        let here = 0;
        for (const [row, words_of] of rows) {
          row.hidden = !words.every((word) => words_of.includes(word));
          here += row.hidden ? 0 : 1;
        }
        body.hidden = !here;
        shown += here;
        all += rows.length;
      }
      output.textContent = words.length ? `${shown} of ${all} rows` : "";
      say(words.length ? `${shown} of ${all} rows shown.` : `All ${all} rows shown.`);
    });
    return [make("label", {}, "Filter rows", box), output];
  }

  function choosing(table) {
    const heads = headings(table).slice(1);
    const over = table.tHead.querySelector(".over");
    const spans = over ? [...over.cells].slice(1).map((cell) => [cell, cell.colSpan]) : [];
    const boxes = heads.map((head, place) => {
      const box = make("input", { type: "checkbox", checked: true });
      box.addEventListener("change", () => {
        head.hidden = !box.checked;
        for (const body of bodiesOf(table)) {
          for (const row of rowsOf(body)) row.cells[place + 1].hidden = !box.checked;
        }
        let start = 0;
        for (const [cell, span] of spans) {
          const left = heads.slice(start, start + span).filter((other) => !other.hidden).length;
          cell.hidden = !left;
          if (left) cell.colSpan = left;
          start += span;
        }
        const shown = heads.filter((other) => !other.hidden).length;
        for (const group of table.querySelectorAll(".group > th")) group.colSpan = shown + 1;
        say(`${shown} of ${heads.length} columns shown.`);
      });
      return make("label", {}, box, text(head));
    });
    const legend = make("legend", { class: "unseen" }, "Columns to show");
    return make("details", { class: "columns" }, make("summary", {}, "Columns"), make("fieldset", {}, legend, ...boxes));
  }

  function pressable(table) {
    const places = [];
    for (const body of bodiesOf(table)) {
      for (const row of rowsOf(body)) {
        for (const cell of [...row.cells].slice(1)) {
          if (!(cell.dataset.runs ?? row.dataset.runs) || !cell.hasChildNodes()) continue;
          const button = make("button", { type: "button", class: "cell", tabindex: places.length ? "-1" : "0" });
          button.append(...cell.childNodes);
          cell.append(button);
          places.push(button);
        }
      }
    }
    // one stop of the tabulator for all numbers of a table; arrows move between them
    table.addEventListener("focusin", (event) => {
      if (!event.target.matches(".cell")) return;
      for (const other of table.querySelectorAll('.cell[tabindex="0"]')) other.tabIndex = -1;
      event.target.tabIndex = 0;
    });
    table.addEventListener("keydown", (event) => {
      if (!event.target.matches(".cell")) return;
      const cell = event.target.closest("td");
      const row = cell.parentElement;
      const rows = bodiesOf(table).flatMap(rowsOf).filter((other) => other.offsetParent);
      const open_cells = (other) => [...other.cells].filter((c) => !c.hidden && c.querySelector(".cell"));
      const here = open_cells(row);
      const step = { ArrowLeft: -1, ArrowRight: 1, Home: -here.length, End: here.length }[event.key];
      const way = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      let next = null;
      if (step) {
        next = here[Math.min(here.length - 1, Math.max(0, here.indexOf(cell) + step))];
      } else if (way) {
        for (let i = rows.indexOf(row) + way; rows[i] && !next; i += way) {
          next = rows[i].cells[cell.cellIndex].querySelector(".cell") ? rows[i].cells[cell.cellIndex] : null;
        }
      } else return;
      event.preventDefault();
      next?.querySelector(".cell").focus();
    });
    table.addEventListener("click", (event) => {
      const button = event.target.closest(".cell");
      if (button) show(button.closest("td"), table);
    });
    return places.length;
  }

  // ---- runs of a number
  function number(metric, value) {
    if (value === null || value === undefined) return "—";
    const scaled = value * metric.scale;
    if (Math.abs(scaled) >= 1e12) return scaled.toExponential(Math.max(1, metric.digits));
    return metric.significant ? String(Number(scaled.toPrecision(metric.digits))) : scaled.toFixed(metric.digits);
  }

  async function show(cell, table) {
    const row = cell.parentElement;
    const label = text(row.cells[0].querySelector("a") ?? row.cells[0]);
    const head = headings(table)[cell.cellIndex];
    const group = text(row.parentElement.querySelector(".group") ?? make("i"));
    let runs;
    try {
      runs = await unpack("runs");
    } catch (error) {
      open(label, make("p", {}, error.message));
      return;
    }
    const indices = (cell.dataset.runs ?? row.dataset.runs).split(/[ +]/).map(Number);
    const over = table.tHead.querySelector(".over") ? `${head.dataset.metric}, ${overOf(table, cell)} ` : "";
    const about = [group, `${over}${text(head)}: ${text(cell)}`].filter(Boolean).join(" · ");
    const metric = runs.metrics?.[head.dataset.metric];
    const title = `${label}: ${indices.length} ${indices.length === 1 ? "run" : "runs"}`;
    open(
      title,
      make("p", {}, about),
      overview(runs, indices, metric),
      curves(runs, indices),
      make("h3", {}, "Each run"),
      ...indices.map((index) => one(runs, index, indices.length === 1)),
    );
    say(`${title}, ${about}`);
  }
  function overOf(table, cell) {
    let start = 1;
    for (const over of [...table.tHead.querySelector(".over").cells].slice(1)) {
      const span = over.hidden ? 1 : over.colSpan;
      if (cell.cellIndex < start + span) return text(over);
      start += span;
    }
    return "";
  }

  function overview(runs, indices, metric) {
    const settings = new Set(indices.map((index) => at(runs, "setting", index)));
    const columns = [
      ["seed", (i) => at(runs, "seed", i)],
      settings.size > 1 ? ["setting", (i) => at(runs, "setting", i)] : null,
      metric ? [metric.title, (i) => number(metric, metric.values[i])] : null,
      ["status", (i) => at(runs, "status", i)],
      ["seconds", (i) => at(runs, "seconds", i)?.toLocaleString("en", { maximumFractionDigits: 1 })],
      ["finished", (i) => at(runs, "finished", i)],
    ].filter(Boolean);
    const head = make("tr", {}, ...columns.map(([name]) => make("th", { scope: "col" }, name)));
    const body = indices.map((index) =>
      make("tr", {}, ...columns.map(([, value], place) =>
        make(place ? "td" : "th", place ? {} : { scope: "row" }, String(value(index) ?? "—")))));
    const table = make("table", { class: "runs-of" }, make("thead", {}, head), make("tbody", {}, ...body));
    return make("div", { class: "scroll", role: "region", "aria-label": "Runs", tabindex: "0" }, table);
  }

  function one(runs, index, isOpen) {
    const get = (name) => at(runs, name, index);
    const rows = ["task", "norm", "seed", "status", "reason", "setting", "options", "made"]
      .map((name) => [name, get(name)])
      .filter(([, value]) => value !== null && value !== "");
    const pairs = rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value))));
    const key = get("key");
    pairs.push(make("div", {}, make("dt", {}, "key"), make("dd", {}, make("code", {}, key))));
    const folder = get("folder");
    if (folder) {
      const button = copier("Copy path", "Path of the run", async () => folder);
      pairs.push(make("div", {}, make("dt", {}, "folder"), make("dd", {}, make("code", {}, folder), button)));
    }
    const measured = Object.values(runs.metrics ?? {}).filter((metric) => (metric.values[index] ?? null) !== null);
    const numbers = measured.map((metric) =>
      make("div", {}, make("dt", {}, metric.title), make("dd", {}, number(metric, metric.values[index]))));
    const artifacts = (get("artifacts") ?? []).map((artifact) => shown(artifact, folder));
    return make(
      "details",
      { class: "run", open: isOpen },
      make("summary", {}, `seed ${get("seed")} · ${get("status")} · ${key}`),
      make("dl", {}, ...pairs),
      measured.length ? make("h4", {}, "Metrics") : null,
      measured.length ? make("dl", { class: "metrics" }, ...numbers) : null,
      artifacts.length ? make("h4", {}, "Artifacts") : null,
      ...artifacts,
    );
  }
  function shown(artifact, folder) {
    const name = make("p", {}, make("code", {}, folder ? `${folder}/${artifact.name}` : artifact.name));
    const content = artifact.text ?? null;
    if (content === null) return name;
    if (artifact.kind === "svg") {
      // as an image: nothing in it runs or loads
      const address = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(content)}`;
      return make("div", {}, name, make("img", { src: address, alt: `Picture ${artifact.name}` }));
    }
    return make("div", {}, name, make("pre", { tabindex: "0", role: "region", "aria-label": artifact.name }, content));
  }

  // ---- learning curves
  const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
  const look = (place) => ({
    stroke: `var(--c${place % 7})`, "stroke-dasharray": DASHES[Math.floor(place / 7) % 4], fill: "none", "stroke-width": "1.8",
  });
  function curves(runs, indices) {
    const settings = new Set(indices.map((index) => at(runs, "setting", index)));
    const named = (index) => `seed ${at(runs, "seed", index)}${settings.size > 1 ? `, ${at(runs, "setting", index)}` : ""}`;
    const series = {};
    indices.forEach((index, place) => {
      for (const [quantity, [x, y]] of Object.entries(at(runs, "curves", index) ?? {})) {
        (series[quantity] ??= []).push({ name: named(index), place, x, y });
      }
    });
    const names = Object.keys(series);
    if (!names.length) return null;
    const keys = indices.map((index, place) =>
      make("li", {}, draw("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" }, draw("path", { d: "M1 5H29", ...look(place) })), named(index)));
    const charts = (some) => make("div", { class: "curves" }, ...some.map((name) => chart(name, series[name])));
    const more = names.slice(FIRST_CURVES);
    const rest = make("details", {}, make("summary", {}, `${more.length} more quantities`));
    rest.addEventListener("toggle", () => { if (rest.children.length === 1) rest.append(charts(more)); });
    return make("div", {}, make("h3", {}, "Learning curves"), make("ul", { class: "legend" }, ...keys),
      charts(names.slice(0, FIRST_CURVES)), more.length ? rest : null);
  }
  function ticks(low, high) {
    if (low === high) return [low];
    const rough = (high - low) / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  }
  const short = (value) => String(Number(value.toPrecision(3)));
  function chart(title, lines) {
    const [width, height, left, right, top, bottom] = [300, 190, 46, 10, 10, 36];
    const xs = lines.flatMap((line) => line.x);
    const ys = lines.flatMap((line) => line.y).filter((y) => y !== null);
    const caption = make("figcaption", {}, title);
    if (!ys.length) return make("figure", {}, caption, make("p", {}, "No finite value."));
    const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const scale = (low, high, from, to) => (v) => (low === high ? (from + to) / 2 : from + ((v - low) / (high - low)) * (to - from));
    const x = scale(x0, x1, left + 6, width - right - 6);
    const y = scale(y0, y1, height - bottom - 6, top + 6);
    const parts = [];
    for (const value of ticks(y0, y1)) {
      parts.push(draw("path", { class: "rule", d: `M${left} ${y(value)}H${width - right}` }));
      parts.push(draw("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    for (const value of ticks(x0, x1)) {
      if (Number.isInteger(x0) && !Number.isInteger(value)) continue;
      parts.push(draw("text", { x: x(value), y: height - bottom + 15, "text-anchor": "middle" }, short(value)));
    }
    parts.push(draw("path", { class: "axis", d: `M${left} ${top}V${height - bottom}H${width - right}`, fill: "none" }));
    parts.push(draw("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, "epoch or step"));
    for (const line of lines) {
      let path = "";
      let pen = "M";
      line.y.forEach((value, i) => {
        // a history with several trainings begins again at its first epoch: no line joins two of them
        if (value === null || (i && line.x[i] <= line.x[i - 1])) pen = "M";
        if (value === null) return;
        path += `${pen}${x(line.x[i]).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = "L";
      });
      parts.push(draw("path", { d: path, ...look(line.place) }));
      if (line.x.length > 30) continue;
      line.y.forEach((value, i) => {
        if (value !== null) parts.push(draw("circle", { cx: x(line.x[i]), cy: y(value), r: 2.4, fill: `var(--c${line.place % 7})` }));
      });
    }
    const told = lines.map((line) => {
      const finite = line.y.filter((value) => value !== null);
      return finite.length ? `${line.name} from ${short(finite[0])} to ${short(finite[finite.length - 1])}` : `${line.name} without a finite value`;
    });
    const label = `${title} by epoch or step: ${told.slice(0, 10).join("; ")}`;
    return make("figure", {}, caption, draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...parts));
  }

  // ---- each table, one at a time, so that the page answers meanwhile
  const waiting = [...document.querySelectorAll(".block")];
  const later = window.requestIdleCallback ?? ((work) => setTimeout(work, 1));
  function next() {
    const block = waiting.shift();
    if (!block) {
      document.documentElement.dataset.ready = "yes";
      return;
    }
    const table = block.querySelector("table");
    const numbers = pressable(table);
    sortable(table);
    const [get, name] = [async (place) => (await unpack("texts"))[block.dataset.table][place], text(table.caption.querySelector("b"))];
    block.prepend(make(
      "div",
      { class: "tools", role: "group", "aria-label": `Tools of table ${name}` },
      ...filtering(table),
      choosing(table),
      "cut" in block.dataset ? null : make("span", { class: "end" },
        copier("Copy as LaTeX", `LaTeX of ${name}`, () => get(0)),
        copier("Copy as CSV", `CSV of ${name}`, () => get(1))),
    ));
    const hint = `Headings sort${numbers ? "; a number opens its runs, arrow keys move between numbers" : ""}.`;
    block.querySelector(".scroll").after(make("p", { class: "cut tools" }, hint));
    later(next);
  }
  later(next);
})();
