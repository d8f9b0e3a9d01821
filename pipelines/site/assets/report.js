// Search, the filter of the claims, figures in large. Pages read without it; nothing is fetched, so it works from a file.
"use strict";
const up = document.currentScript.dataset.up;

function wordsOf(text) {
  return text.toLowerCase().split(/\s+/).filter(Boolean);
}

// --- search: the index is a script of its own, loaded when the box is first used ---

const box = document.getElementById("search"), found = document.getElementById("found");

function loadIndex() {
  if (!window.searchIndex && !document.getElementById("index")) {
    const script = document.createElement("script");
    script.id = "index";
    script.src = up + "assets/search.js";
    script.onload = showFound;
    document.head.append(script);
  }
}

function scored(words) {
  return window.searchIndex.map(([title, href, text]) => {
    const head = title.toLowerCase(), body = text.toLowerCase();
    let score = 0;
    for (const word of words) {
      const here = (head.includes(word) ? 10 : 0) + (body.includes(word) ? 1 : 0);
      if (!here) return null;
      score += here;
    }
    return { title, href, text, score };
  }).filter(Boolean).sort((a, b) => b.score - a.score).slice(0, 20);
}

function entry({ title, href, text }, words) {
  const line = document.createElement("li"), link = document.createElement("a");
  const head = document.createElement("b"), body = document.createElement("span");
  const near = Math.max(0, text.toLowerCase().indexOf(words[0]) - 40), at = near && text.indexOf(" ", near) + 1;
  link.href = up + href;
  head.textContent = title;
  body.textContent = (at ? "… " : "") + text.slice(at, at + 160);
  link.append(head, body);
  line.append(link);
  return line;
}

function showFound() {
  const words = wordsOf(box.value);
  found.hidden = !words.length || !window.searchIndex;
  if (found.hidden) return;
  const entries = scored(words).map(one => entry(one, words));
  if (!entries.length) {
    const none = document.createElement("li");
    none.className = "none";
    none.textContent = "nothing found";
    entries.push(none);
  }
  found.replaceChildren(...entries);
}

function moved(event) {
  const links = [...found.querySelectorAll("a")], at = links.indexOf(document.activeElement);
  if (event.key === "Escape") { found.hidden = true; box.focus(); return; }
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || found.hidden || !links.length) return;
  event.preventDefault();
  (links[at + step] || (step > 0 ? links[links.length - 1] : box)).focus();
}

box.addEventListener("focus", loadIndex);
box.addEventListener("input", showFound);
box.form.addEventListener("keydown", moved);
box.form.addEventListener("submit", event => {
  event.preventDefault();
  found.querySelector("a")?.click();
});
document.addEventListener("click", event => { if (!box.form.contains(event.target)) found.hidden = true; });
document.addEventListener("keydown", event => {
  if (event.key === "/" && !/^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName)) { event.preventDefault(); box.focus(); }
});

// --- on a phone the contents are folded ---

if (matchMedia("(max-width: 52rem)").matches) document.querySelector(".toc details")?.removeAttribute("open");

// --- figures in large ---

const zoom = document.getElementById("zoom");
for (const link of document.querySelectorAll("a.zoom")) {
  link.addEventListener("click", event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const image = zoom.querySelector("img");
    image.src = link.href;
    image.alt = link.querySelector("img").alt;
    zoom.showModal();
  });
}
zoom.addEventListener("click", event => { if (event.target === zoom) zoom.close(); });

// --- the filter of the claims; an address that ends in #fails shows those that fail ---

const filter = document.getElementById("filter");

function applyFilter() {
  const words = wordsOf(filter.words.value);
  const kinds = new Set([...filter.querySelectorAll("input:checked")].map(input => input.value));
  let count = 0;
  for (const group of document.querySelectorAll(".claims")) {
    for (const claim of group.querySelectorAll(".claim")) {
      const text = claim.textContent.toLowerCase();
      claim.hidden = !kinds.has(claim.dataset.verdict) || !words.every(word => text.includes(word));
      count += !claim.hidden;
    }
    group.hidden = !group.querySelector(".claim:not([hidden])");
  }
  document.getElementById("shown").textContent = `${count} shown`;
}

function followAddress() {
  const inputs = [...filter.querySelectorAll("input[type=checkbox]")], asked = location.hash.slice(1);
  const one = inputs.some(input => input.value === asked);
  if (one || asked.startsWith("claim-")) {
    filter.words.value = "";
    for (const input of inputs) input.checked = !one || input.value === asked;
  }
  applyFilter();
  document.getElementById(asked)?.scrollIntoView();
}

if (filter) {
  filter.addEventListener("input", applyFilter);
  filter.addEventListener("submit", event => event.preventDefault());
  window.addEventListener("hashchange", followAddress);
  followAddress();
}
