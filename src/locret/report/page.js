"use strict";
// A click on a column's head sorts by it; a second click turns it round. Empty fields stay at the end.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => head.querySelector("button").addEventListener("click", () => {
    const text = head.dataset.kind === "text";
    const up = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "descending" : text;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[at].dataset.v;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return (text ? x.localeCompare(y, "en") : x - y) * (up ? 1 : -1);
    });
    table.tBodies[0].append(...rows);
  }));
}
// Follows the system's colours until the button is used.
const root = document.documentElement;
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
