// Before anything is drawn: the theme that was chosen, or the system's.
(() => {
  let theme = null
  try { theme = localStorage.getItem("graphopt-theme") } catch { /* a page opened from a file may have no storage */ }
  if (theme !== "light" && theme !== "dark") theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"
  document.documentElement.dataset.theme = theme
})()
