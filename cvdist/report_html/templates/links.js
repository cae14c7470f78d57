
// MLflow shows the page in a sandboxed frame in which links do not work, not even those within the page.
document.addEventListener("click", (event) => {
  const link = location.protocol === "blob:" && event.target.closest("nav a");
  if (link) document.getElementById(link.hash.slice(1)).scrollIntoView();
});
