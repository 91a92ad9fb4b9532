"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";

  function element(name, attributes, ...children) {
    const svg = ["svg", "g", "line", "path", "text", "title"].includes(name);
    const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value !== undefined) node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }

  function toggle(label, pressed, action) {
    const button = element("button", { type: "button", "aria-pressed": pressed }, label);
    button.addEventListener("click", () => action(button));
    return button;
  }

  // The table: a click on a header sorts by its column, another one turns the order round.
  const table = document.getElementById("table");
  const heads = [...table.tHead.querySelectorAll("th[data-column]")];

  function sortBy(head) {
    const column = heads.indexOf(head);
    const falling = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => {
      const text = row.cells[column].dataset.value ?? "";
      return { row, text, number: text === "" ? NaN : Number(text) };
    });
    const numeric = rows.every(({ text, number }) => text === "" || !Number.isNaN(number));
    const sign = falling ? -1 : 1;
    rows.sort((a, b) => {
      if (a.text === "" || b.text === "") return (a.text === "") - (b.text === ""); // empty: last
      if (numeric) return sign * (a.number - b.number);
      return sign * a.text.localeCompare(b.text, "en", { numeric: true });
    });
    table.tBodies[0].append(...rows.map(({ row }) => row));
  }
  for (const head of heads) {
    head.querySelector("button").addEventListener("click", () => sortBy(head));
  }

  // Which measures the table shows.
  const measures = document.getElementById("measures");
  function showMeasure(name, shown) {
    for (const cell of table.querySelectorAll(`[data-metric="${name}"]`)) cell.hidden = !shown;
  }
  if (data.metrics.length > 1) {
    measures.append(element("span", {}, "Show"));
    for (const metric of data.metrics) {
      showMeasure(metric.name, metric.shown);
      measures.append(toggle(metric.title, metric.shown, (button) => {
        const shown = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", shown);
        showMeasure(metric.name, shown);
        draw();
      }));
    }
  }
  const chosen = (metric) => {
    const cell = table.tHead.querySelector(`[data-metric="${metric.name}"]`);
    return cell !== null && !cell.hidden;
  };

  // The plots.
  const HEIGHT = 330, LEFT = 58, RIGHT = 14, TOP = 12, BOTTOM = 44;
  const charts = document.getElementById("charts");
  let width = 520; // of a plot's drawing; less where there is less room, so that text stays legible
  const MARKS = { // of one area, about the origin
    none: "M5 0A5 5 0 1 1 -5 0A5 5 0 1 1 5 0Z",
    teacher: "M0 -6.3L5.8 4.2L-5.8 4.2Z",
    self: "M0 -5.8L5.8 0L0 5.8L-5.8 0Z",
  };
  const COLOURS = 12;
  const paintOf = (family) => `var(--s${family % COLOURS})`;
  const hidden = new Set();
  let across = data.axes[0];

  function mark(kind, colour, x, y) {
    const hollow = kind === "self";
    const paint = `${hollow ? "stroke" : "fill"}:${paintOf(colour)}`;
    return element("path", {
      d: MARKS[kind], class: hollow ? "mark hollow" : "mark", style: paint,
      transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
    });
  }

  function format(value) {
    const size = Math.abs(value);
    if (size >= 1e5 || (size > 0 && size < 1e-3)) return value.toExponential(0).replace("e+", "e");
    return String(Number(value.toPrecision(3)));
  }

  // A scale: linear, or logarithmic where positive values span more than `ratio`.
  function scale(values, low, high, ratio) {
    let least = Math.min(...values), most = Math.max(...values);
    const logarithmic = least > 0 && most / least > ratio;
    const to = logarithmic ? Math.log10 : (value) => value;
    least = to(least); most = to(most);
    const margin = (most - least) * 0.06 || Math.abs(most) * 0.1 || 1;
    least -= margin; most += margin;
    const place = (value) => low + ((to(value) - least) / (most - least)) * (high - low);
    return { place, ticks: logarithmic ? decades(least, most) : rounds(least, most) };
  }

  // The values whose labels do not touch.
  function apart(values, place) {
    let last = -Infinity;
    return values.sort((a, b) => a - b).filter((value) => {
      const free = place(value) - last > 26;
      if (free) last = place(value);
      return free;
    });
  }

  function rounds(least, most) {
    const raw = (most - least) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= raw);
    const ticks = [];
    for (let i = Math.ceil(least / step); i * step <= most; i++) ticks.push(i * step);
    return ticks;
  }

  function decades(least, most) {
    const steps = most - least > 3 ? [1] : most - least > 1.7 ? [1, 3] : [1, 2, 5];
    const ticks = [];
    for (let power = Math.floor(least); power <= most; power++) {
      for (const step of steps) {
        const tick = step * 10 ** power;
        if (Math.log10(tick) >= least && Math.log10(tick) <= most) ticks.push(tick);
      }
    }
    return ticks;
  }

  function chart(metric) {
    const points = data.points.filter((one) => !hidden.has(one.family) && metric.name in one.figures);
    const title = element("figcaption", {}, metric.title + " ", element("small", {}, metric.hint));
    const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img",
      "aria-label": `${metric.title} against ${across.hint}` });
    const figure = element("figure", { "data-chart": metric.name }, title, svg);
    if (points.length === 0) return figure;
    const value = (one) => one.figures[metric.name];
    const costs = points.map((one) => one.costs[across.name]);
    const x = scale(costs, LEFT, width - RIGHT, 6);
    if (across.name === "evaluations") x.ticks = apart([...new Set(costs)], x.place);
    const ends = points.flatMap((one) => [value(one)[0] - value(one)[1], value(one)[0] + value(one)[1]]);
    const y = scale(ends, HEIGHT - BOTTOM, TOP, 8);
    const bottom = HEIGHT - BOTTOM;
    for (const tick of y.ticks) {
      const at = y.place(tick);
      svg.append(element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }),
        element("text", { x: LEFT - 8, y: at + 4, "text-anchor": "end" }, format(tick)));
    }
    for (const tick of x.ticks) {
      const at = x.place(tick);
      svg.append(element("line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 5 }),
        element("text", { x: at, y: bottom + 19, "text-anchor": "middle" }, format(tick)));
    }
    svg.append(element("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: bottom, y2: bottom }),
      element("text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, across.hint));
    const place = (one) => [x.place(one.costs[across.name]), y.place(value(one)[0])];
    const line = (from, to, name, colour) => {
      const [[x1, y1], [x2, y2]] = [place(from), place(to)];
      return element("line", { class: name, x1, y1, x2, y2, style: `stroke:${paintOf(colour)}` });
    };
    const byNumber = new Map(points.map((one) => [one.cell, one]));
    for (const [index] of data.families.entries()) {
      const plain = points.filter((one) => one.family === index && one.guide === "none")
        .sort((a, b) => a.costs[across.name] - b.costs[across.name]);
      for (let i = 1; i < plain.length; i++) svg.append(line(plain[i - 1], plain[i], "trend", index));
    }
    const front = (data.fronts[metric.name]?.[across.name] ?? [])
      .map((number) => byNumber.get(number)).filter(Boolean);
    for (let i = 1; i < front.length; i++) { // better only where it begins: a stair
      const [[x1, y1], [x2, y2]] = [place(front[i - 1]), place(front[i])];
      svg.append(element("path", { class: "front", d: `M${x1} ${y1}H${x2}V${y2}` }));
    }
    for (const one of points) {
      const plain = byNumber.get(one.plain);
      if (plain) svg.append(line(plain, one, "pull", one.family));
    }
    const taken = points.flatMap((one) => { // what a label must not cover: marks and bars
      const [at, height] = place(one), [mean, half] = value(one);
      return [[at - 7, height - 7, at + 7, height + 7],
        [at - 4, y.place(mean + half), at + 4, y.place(mean - half)]];
    });
    for (const one of points) {
      const [mean, half] = value(one), [at, height] = place(one);
      const paint = `stroke:${paintOf(one.family)}`;
      const [top, low] = [y.place(mean + half), y.place(mean - half)];
      const bars = [[at, at, top, low], [at - 4, at + 4, top, top], [at - 4, at + 4, low, low]];
      const group = element("g", { class: "point", "data-cell": one.cell },
        element("title", {}, tell(one, metric)),
        ...bars.map(([x1, x2, y1, y2]) => element("line", { class: "bar", x1, x2, y1, y2, style: paint })),
        mark(one.guide, one.family, at, height));
      svg.append(group);
    }
    for (const guide of ["teacher", "self"]) {
      for (const one of points.filter((one) => one.guide === guide)) {
        svg.append(...tag(one, place(one), taken, bottom));
      }
    }
    const detail = element("p", { class: "detail", "aria-live": "polite" }, READ);
    figure.append(detail);
    svg.addEventListener("pointerdown", (event) => {
      const box = svg.getBoundingClientRect(), size = width / box.width;
      const [across, down] = [(event.clientX - box.left) * size, (event.clientY - box.top) * size];
      const away = (one) => Math.hypot(place(one)[0] - across, place(one)[1] - down);
      const reach = Math.min(Math.min(...points.map(away)) + 5, 40); // marks may cover each other
      const near = points.filter((one) => away(one) < reach);
      detail.textContent = near.map((one) => tell(one, metric)).join("\n\n") || READ;
      const cells = new Set(near.map((one) => String(one.cell)));
      for (const point of svg.querySelectorAll(".point")) {
        point.classList.toggle("chosen", cells.has(point.dataset.cell));
      }
    });
    return figure;
  }

  const READ = "Tap a mark to read what it is.";
  function tell(one, metric) {
    return `${one.label}\n${metric.title}: ${one.figures[metric.name][2]}\n` +
      `${across.hint}: ${format(one.costs[across.name])}`;
  }

  // A guided point's settings beside it, or its λ alone, where there is room: they cover nothing.
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `11px ${getComputedStyle(document.body).fontFamily}`; // as .tag
  function tag(one, [at, height], taken, bottom) {
    for (const text of one.tags) {
      const wide = pen.measureText(text).width;
      const found = [
        [at + 9, height + 4], [at - 9 - wide, height + 4],
        [at - wide / 2, height - 11], [at - wide / 2, height + 20],
      ].find(([left, base]) => left > LEFT && left + wide < width && base > TOP + 8 &&
        base < bottom && !taken.some(([a, b, c, d]) =>
          left < c && left + wide > a && base - 11 < d && base + 3 > b));
      if (found) {
        const [left, base] = found;
        taken.push([left, base - 11, left + wide, base + 3]);
        return [element("text", { class: "tag", x: left, y: base }, text)];
      }
    }
    return [];
  }

  function draw() {
    width = Math.max(300, Math.min(520, charts.clientWidth - 26));
    charts.replaceChildren(...data.metrics.filter(chosen).map(chart));
  }

  const axes = document.getElementById("axes");
  axes.append(element("span", {}, "Against"));
  for (const axis of data.axes) {
    axes.append(toggle(axis.title, axis === across, (button) => {
      across = axis;
      for (const one of axes.querySelectorAll("button")) one.setAttribute("aria-pressed", one === button);
      draw();
    }));
  }
  const legend = document.getElementById("legend");
  const swatch = (kind, colour) => element("svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" },
    mark(kind, colour, 0, 0));
  for (const [index, name] of data.families.entries()) {
    const button = toggle(swatch("none", index), true, (self) => {
      const shown = self.getAttribute("aria-pressed") !== "true";
      self.setAttribute("aria-pressed", shown);
      if (shown) hidden.delete(index); else hidden.add(index);
      draw();
    });
    button.append(name);
    legend.append(button);
  }
  const kinds = { none: "alone", teacher: "with the teacher", self: "with itself" };
  const used = new Set(data.points.map((one) => one.guide));
  for (const [kind, name] of Object.entries(kinds)) {
    if (used.has(kind)) legend.append(element("span", { class: "key" }, swatch(kind, 7), name));
  }
  addEventListener("resize", draw);
  draw();
})();
