"use strict";
// Filters and sorts the completions. Without it, all of them are there to be opened.
const by = (id) => document.getElementById(id);
const form = by("filter");

function filter() {
  const task = by("f-task").value, policy = by("f-policy").value, outcome = by("f-outcome").value;
  const flip = by("f-flip").value, text = by("f-text").value.toLowerCase();
  const asked = outcome || text || flip;
  let found = 0, of = 0;
  for (const part of document.querySelectorAll("details.e")) {
    const head = part.firstElementChild;
    const named = (tag) => head.querySelector(tag).textContent;
    part.hidden = (task && named("b") !== task) || (policy && named("i") !== policy);
    if (part.hidden) continue;
    let within = 0;
    for (const problem of part.querySelectorAll("details.p")) {
      const question = problem.querySelector("pre").textContent.toLowerCase();
      const inQuestion = text && question.includes(text);
      let shown = 0;
      for (const item of problem.querySelectorAll("li")) {
        const fits = (!outcome || item.className === outcome) &&
          (!text || inQuestion || item.lastElementChild.textContent.toLowerCase().includes(text));
        item.hidden = !fits;
        shown += fits;
      }
      problem.hidden = !shown || (flip && !problem.classList.contains(flip));
      within += !problem.hidden;
    }
    of += 1;
    found += within;
    part.hidden = asked && !within;
    if (asked && within) part.open = true;
  }
  by("f-found").textContent = `${found} problems of ${of} rows`;
}

function sort() {
  const order = by("f-order").value;
  const key = { drop: (p) => +p.dataset.d, now: (p) => +p.dataset.n, tokens: (p) => -p.dataset.t };
  for (const part of document.querySelectorAll("details.e")) {
    const problems = [...part.querySelectorAll("details.p")];
    problems.forEach((p, i) => (p.dataset.i ??= i));
    const of = key[order] ?? ((p) => +p.dataset.i);
    problems.sort((a, b) => of(a) - of(b) || a.dataset.i - b.dataset.i);
    part.append(...problems);
  }
}

function reveal() {
  const target = by(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  target?.scrollIntoView();
}

if (form) {
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  let wait;
  for (const kind of ["input", "change"]) {
    form.addEventListener(kind, (event) => {
      clearTimeout(wait);
      wait = setTimeout(event.target.id === "f-order" ? sort : filter, 150);
    });
  }
}
addEventListener("hashchange", reveal);
if (location.hash) reveal();
