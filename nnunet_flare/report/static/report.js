"use strict";
// The table of cases, the view of one case, and the decisions on them. Names are only ever set as text.
(() => {
  const data = window.FLARE_REPORT;
  const CASE = 0, ROUND = 1, DECISION = 2, SCORE = 3, MEAN = 4, LEAST = 5, OUTSIDE = 6, REASON = 7, AGREEMENT = 8,
    VOLUME = 9, PICTURE = 10, VIEW = 11, ABSENT = 12;
  const ROW_HEIGHT = 30; // of a body row in report.css
  const $ = (id) => document.getElementById(id);
  const organName = (index) => (index < 0 ? "" : data.organs[index].name.replaceAll("_", " "));
  const shown = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  // ---------------------------------------------------------------- decisions: case -> {word, organs, comment}

  const KEY = `flare-review:${data.id}`;
  let reviews = new Map();
  let kept = true; // whether this browser keeps decisions; else they last as long as the page, which says so

  function storage(use) {
    if (!kept) return;
    try {
      use(localStorage);
    } catch {
      kept = false;
    }
    $("unkept").hidden = kept;
  }

  function readReviews() { // another tab may have this report open, too
    storage((there) => { reviews = new Map(JSON.parse(there.getItem(KEY) || "[]")); });
  }

  function review(name) {
    return reviews.get(name) || { word: "", organs: [], comment: "" };
  }

  function setReview(name, change) { // `change` gives what is new, from what was decided before
    readReviews();
    const made = review(name);
    const next = { ...made, ...change(made) };
    if (next.word || next.comment) reviews.set(name, next);
    else reviews.delete(name);
    storage((there) => there.setItem(KEY, JSON.stringify([...reviews])));
    showReviews();
  }

  function showReviews() {
    countDecisions();
    draw();
    if ($("case").open) drawReview();
  }

  addEventListener("storage", () => { // decided in another tab
    readReviews();
    showReviews();
  });
  addEventListener("beforeunload", (event) => {
    if (!kept && decided().length) event.preventDefault();
  });

  function reviewText(name) {
    const { word, organs } = review(name);
    if (word !== "organ-wrong") return word;
    return `wrong: ${organs.map((o) => o.replaceAll("_", " ")).join(", ")}`;
  }

  const decided = () => [...reviews].filter(([, made]) => made.word);

  function countDecisions() {
    const count = decided().length;
    $("download").textContent = `Download decisions (${count})`;
    $("download").disabled = count === 0;
  }

  function csv() {
    // a spreadsheet would run a text that starts so as a formula; the reader takes the apostrophe away again
    const guarded = (text) => (/^'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/.test(text) ? `'${text}` : text);
    const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const lines = [["case", "decision", "organ", "comment"]];
    for (const [name, { word, organs, comment }] of decided().sort(([a], [b]) => (a < b ? -1 : 1))) {
      for (const organ of word === "organ-wrong" ? organs : [""]) lines.push([name, word, organ, comment]);
    }
    return lines.map((line) => line.map(guarded).map(quoted).join(",")).join("\n") + "\n";
  }

  $("download").addEventListener("click", () => {
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = "decisions.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });

  // ---------------------------------------------------------------- table

  let visible = [];
  let current = -1;
  let sortBy = { key: "score", down: true };

  const agreementOf = (row, index) => (row[ABSENT].includes(index) ? null : row[AGREEMENT][index]); // none to show
  const scoreOf = (row) => ($("organ").value === "" ? row[SCORE] : agreementOf(row, Number($("organ").value)));
  const scoreText = (row) => ($("organ").value !== "" && row[ABSENT].includes(Number($("organ").value)) ? "absent" : shown(scoreOf(row)));
  const columns = [
    { key: "case", title: () => "case", value: (row) => row[CASE] },
    { key: "round", title: () => "round", value: (row) => row[ROUND], text: (row) => `r${row[ROUND]}` },
    { key: "decision", title: () => "decision", value: (row) => row[DECISION], class: (row) => row[DECISION] },
    { key: "score", title: () => ($("organ").value === "" ? "score" : organName(Number($("organ").value))),
      value: scoreOf, text: scoreText },
    { key: "mean", title: () => "mean", value: (row) => row[MEAN], text: (row) => shown(row[MEAN]),
      hint: "mean agreement over the organs" },
    { key: "least", title: () => "least certain", value: (row) => organName(row[LEAST]),
      text: (row) => (row[LEAST] < 0 ? "–" : `${shown(row[AGREEMENT][row[LEAST]], 2)} ${organName(row[LEAST])}`) },
    { key: "outside", title: () => "odd sizes", value: (row) => row[OUTSIDE], text: (row) => (row[OUTSIDE] ? `${row[OUTSIDE]} organ${row[OUTSIDE] > 1 ? "s" : ""}` : "–"),
      hint: "how many organs have a volume outside the range of the labelled set" },
    { key: "review", title: () => "review", value: (row) => reviewText(row[CASE]),
      hint: "your decision" },
    { key: "reason", title: () => "reason", value: (row) => row[REASON] },
  ];

  const head = document.querySelector("#table thead tr");
  for (const column of columns) {
    const cell = element("th");
    const button = element("button");
    button.type = "button";
    button.dataset.key = column.key;
    if (column.hint) button.title = column.hint;
    button.addEventListener("click", () => {
      sortBy = { key: column.key, down: sortBy.key === column.key ? !sortBy.down : false };
      refresh();
    });
    cell.append(button);
    head.append(cell);
  }

  function drawHead() {
    columns.forEach((column, index) => {
      const cell = head.children[index];
      const sorted = sortBy.key === column.key;
      cell.setAttribute("aria-sort", sorted ? (sortBy.down ? "descending" : "ascending") : "none");
      cell.firstChild.textContent = column.title() + (sorted ? (sortBy.down ? " ▼" : " ▲") : "");
    });
  }

  function compare(a, b) {
    if (a === b) return 0;
    if (a === null || a === "") return 1; // nothing comes last, whichever way
    if (b === null || b === "") return -1;
    return (a < b ? -1 : 1) * (sortBy.down ? -1 : 1);
  }

  function refresh() {
    const words = $("text").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const low = $("low").value === "" ? -Infinity : Number($("low").value);
    const high = $("high").value === "" ? Infinity : Number($("high").value);
    const bounded = low > -Infinity || high < Infinity;
    const opened = visible[current];
    visible = data.rows.filter((row) => {
      if ($("round").value !== "" && row[ROUND] !== Number($("round").value)) return false;
      if ($("decision").value !== "" && row[DECISION] !== $("decision").value) return false;
      if ($("pictured").checked && !row[PICTURE]) return false;
      const score = scoreOf(row);
      if (bounded && (score === null || score < low || score > high)) return false;
      const text = `${row[CASE]} ${organName(row[LEAST])} ${row[REASON]}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const { value } = columns.find((column) => column.key === sortBy.key);
    const keyed = visible.map((row) => [value(row), row]);
    keyed.sort((a, b) => compare(a[0], b[0]) || (a[1][CASE] < b[1][CASE] ? -1 : a[1][CASE] > b[1][CASE] ? 1 : a[1][ROUND] - b[1][ROUND]));
    visible = keyed.map(([, row]) => row);
    current = visible.indexOf(opened);
    $("count").textContent = `${visible.length} of ${data.rows.length} rows`;
    drawHead();
    $("scroller").scrollTop = 0;
    draw();
  }

  function space(height) {
    const row = element("tr", undefined, "space");
    const cell = element("td");
    cell.colSpan = columns.length;
    cell.style.height = `${height}px`;
    row.append(cell);
    return row;
  }

  function draw() { // only the rows in view, and a screenful around them
    const scroller = $("scroller");
    const first = Math.max(0, Math.floor(scroller.scrollTop / ROW_HEIGHT) - 15);
    const last = Math.min(visible.length, first + Math.ceil(scroller.clientHeight / ROW_HEIGHT) + 30);
    const drawn = document.createDocumentFragment();
    if (first) drawn.append(space(first * ROW_HEIGHT));
    for (let index = first; index < last; index++) {
      const row = visible[index];
      const line = element("tr", undefined, index === current ? "current" : "");
      line.dataset.index = index;
      for (const column of columns) {
        const text = String((column.text || column.value)(row));
        const cell = element("td", text, column.class && column.class(row));
        if (text.length > 16) cell.title = text;
        line.append(cell);
      }
      drawn.append(line);
    }
    if (last < visible.length) drawn.append(space((visible.length - last) * ROW_HEIGHT));
    document.querySelector("#table tbody").replaceChildren(drawn);
  }

  function choose(index) {
    if (!visible.length) return;
    current = Math.max(0, Math.min(visible.length - 1, index));
    const scroller = $("scroller");
    const top = current * ROW_HEIGHT, room = scroller.clientHeight - 2 * ROW_HEIGHT;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    if (top > scroller.scrollTop + room) scroller.scrollTop = top - room;
    draw();
  }

  let waiting = false;
  $("scroller").addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  });
  addEventListener("resize", draw);
  document.querySelector("#table tbody").addEventListener("click", (event) => {
    const line = event.target.closest("tr[data-index]");
    if (line) open(Number(line.dataset.index));
  });

  function option(select, value, text) {
    const made = element("option", text);
    made.value = value;
    $(select).append(made);
  }
  for (const number of new Set(data.rows.map((row) => row[ROUND]))) option("round", number, `r${number}`);
  for (const word of new Set(data.rows.map((row) => row[DECISION]))) option("decision", word, word);
  data.organs.forEach((organ, index) => option("organ", index, organName(index)));
  $("filters").addEventListener("input", refresh);
  for (const id of ["round", "decision", "organ"]) $(id).addEventListener("change", refresh); // drivers fire no input
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(refresh));

  // ---------------------------------------------------------------- one case

  function open(index) {
    choose(index);
    const row = visible[current];
    if (!row) return;
    $("case-name").textContent = row[CASE];
    $("case-state").textContent = `r${row[ROUND]}, ${row[DECISION]}`;
    $("case-state").className = row[DECISION];
    $("case-reason").textContent = row[REASON];
    $("position").textContent = `${current + 1} of ${visible.length}`;
    $("previous").disabled = current === 0;
    $("next").disabled = current === visible.length - 1;
    if (row[PICTURE]) {
      $("picture-link").href = `pictures/r${row[ROUND]}/${encodeURIComponent(row[CASE])}.jpg`;
      $("picture").src = `pictures/r${row[ROUND]}/${encodeURIComponent(row[CASE])}.jpg`;
      const organ = organName(Math.max(0, row[LEAST])); // of a single model, which has no least certain organ, the first
      $("picture").alt = `${row[CASE]}: three planes through ${organ}`;
      $("picture-organ").textContent = organ;
    } else $("picture").removeAttribute("src");
    drawHistory(row);
    if (!$("case").open) $("case").showModal();
    drawFigure(row);
    drawReview();
  }

  let solid = false; // whether the 3-D view is wanted where there is one

  async function drawFigure(row) {
    const viewed = solid && Boolean(row[VIEW]);
    $("tabs").hidden = !row[VIEW];
    $("slices").setAttribute("aria-pressed", !viewed);
    $("solid").setAttribute("aria-pressed", viewed);
    $("view-message").textContent = "";
    showSlices(row, !viewed);
    if (!viewed) return;
    const { show } = window.FLARE_VIEW;
    const shown = await show($("canvas"), row[ROUND], row[CASE], data.organs, $("view-message"), $("view-organ"));
    if (!shown) showSlices(row, true);
  }

  function showSlices(row, wanted) {
    $("view").hidden = wanted;
    for (const id of ["picture", "heads", "caption"]) $(id).hidden = !wanted || !row[PICTURE];
    $("no-picture").hidden = !wanted || Boolean(row[PICTURE]);
  }

  function turnTo(wanted) {
    if (!visible[current][VIEW]) return;
    solid = wanted;
    drawFigure(visible[current]);
  }

  function drawReview() {
    const row = visible[current];
    const made = review(row[CASE]);
    $("accept").setAttribute("aria-pressed", made.word === "accept");
    $("reject").setAttribute("aria-pressed", made.word === "reject");
    $("undo").disabled = !made.word;
    $("review-state").textContent = made.word ? `Your decision: ${reviewText(row[CASE])}` : "Not decided";
    if (document.activeElement !== $("comment")) $("comment").value = made.comment;
    const body = document.querySelector("#organs tbody");
    const focused = body.contains(document.activeElement) ? [...body.querySelectorAll("button")].indexOf(document.activeElement) : -1;
    body.replaceChildren(...data.organs.map((organ, index) => organRow(row, organ, index, made)));
    if (focused >= 0) body.querySelectorAll("button")[focused].focus();
  }

  function organRow(row, organ, index, made) {
    const line = element("tr", undefined, index === row[LEAST] ? "least" : "");
    const name = element("th");
    const swatch = element("span", undefined, "swatch");
    swatch.style.background = organ.colour;
    name.append(swatch, organName(index));
    const volume = row[VOLUME][index];
    const [low, high] = organ.range;
    const outside = volume !== null && low !== undefined && (volume < low || volume > high);
    const wrong = element("button", "wrong");
    wrong.type = "button";
    wrong.setAttribute("aria-label", `${organName(index)} is wrong`);
    wrong.setAttribute("aria-pressed", made.word === "organ-wrong" && made.organs.includes(organ.name));
    wrong.disabled = row[VOLUME].every((ml) => ml === null); // no label was made
    wrong.addEventListener("click", () => toggleWrong(index));
    const last = element("td");
    last.append(wrong);
    const isAbsent = row[ABSENT].includes(index);
    const agreement = element("td", isAbsent ? "absent" : shown(row[AGREEMENT][index]), isAbsent ? "absent" : "");
    if (isAbsent) agreement.title = `no member found it; counted as ${shown(row[AGREEMENT][index])}`;
    line.append(
      name,
      agreement,
      element("td", shown(volume, 1) + (outside ? (volume < low ? " (small)" : " (large)") : ""), outside ? "outside" : ""),
      element("td", low === undefined ? "–" : `${shown(low, 1)} to ${shown(high, 1)}`),
      last,
    );
    return line;
  }

  function drawHistory(row) {
    const same = data.rows.filter((other) => other[CASE] === row[CASE]);
    $("history").hidden = same.length < 2;
    document.querySelector("#history tbody").replaceChildren(...same.map((other) => {
      const line = element("tr");
      line.append(element("td", `r${other[ROUND]}`), element("td", other[DECISION], other[DECISION]),
        element("td", shown(other[SCORE])), element("td", other[REASON]));
      return line;
    }));
  }

  function decide(word) {
    setReview(visible[current][CASE], () => ({ word, organs: [] }));
  }

  function toggleWrong(index) {
    if (index < 0) return;
    const organ = data.organs[index].name;
    setReview(visible[current][CASE], (made) => {
      const organs = new Set(made.word === "organ-wrong" ? made.organs : []);
      if (!organs.delete(organ)) organs.add(organ);
      return { word: organs.size ? "organ-wrong" : "", organs: [...organs] };
    });
  }

  $("slices").addEventListener("click", () => turnTo(false));
  $("solid").addEventListener("click", () => turnTo(true));
  $("accept").addEventListener("click", () => decide("accept"));
  $("reject").addEventListener("click", () => decide("reject"));
  $("undo").addEventListener("click", () => decide(""));
  $("comment").addEventListener("input", () => setReview(visible[current][CASE], () => ({ comment: $("comment").value.trim() })));
  $("previous").addEventListener("click", () => open(current - 1));
  $("next").addEventListener("click", () => open(current + 1));
  $("close").addEventListener("click", () => $("case").close()); // the browser gives the focus back to the table

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const inCase = $("case").open;
    const keys = inCase
      ? { ArrowLeft: () => current > 0 && open(current - 1), ArrowRight: () => current < visible.length - 1 && open(current + 1),
          a: () => decide("accept"), r: () => decide("reject"), u: () => decide(""),
          w: () => toggleWrong(visible[current][LEAST]), v: () => turnTo(!solid) }
      : { "/": () => $("text").focus() };
    if (!inCase && document.activeElement === $("scroller")) {
      Object.assign(keys, { ArrowDown: () => choose(current + 1), ArrowUp: () => choose(current - 1),
        PageDown: () => choose(current + 10), PageUp: () => choose(current - 10),
        Home: () => choose(0), End: () => choose(visible.length - 1), Enter: () => open(current) });
    }
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });

  if (data.rows.length) $("round").value = String(Math.max(...data.rows.map((row) => row[ROUND])));
  readReviews();
  countDecisions();
  refresh();
})();
