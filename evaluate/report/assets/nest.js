"use strict";
// The nest as a tree: each latent under one parent, the tightest (of the latest group) that holds enough of its rows.
// Latents are in the order of their groups, so a parent's number is always below that of its child.

function buildNest(edges, groups, least) {
  const n = groups.length, parent = new Int32Array(n).fill(-1), inside = new Uint16Array(n), share = new Uint16Array(n);
  for (let e = 0; e < edges.parent.length; e++) {
    if (edges.inside[e] < least) continue;
    const p = edges.parent[e], c = edges.child[e], old = parent[c];
    if (old >= 0 && (groups[p] < groups[old] || (groups[p] === groups[old] && edges.inside[e] <= inside[c]))) continue;
    parent[c] = p;
    inside[c] = edges.inside[e];
    share[c] = edges.share[e];
  }
  const below = new Int32Array(n), start = new Int32Array(n + 1), at = new Int32Array(n);
  for (let c = n - 1; c >= 0; c--) if (parent[c] >= 0) { below[parent[c]] += below[c] + 1; start[parent[c] + 1]++; }
  for (let i = 0; i < n; i++) start[i + 1] += start[i];
  const list = new Int32Array(start[n]);
  for (let c = 0; c < n; c++) if (parent[c] >= 0) list[start[parent[c]] + at[parent[c]]++] = c;
  // children(i): those right under latent i, the one that is the largest part of its rows first.
  const children = (i) => [...list.subarray(start[i], start[i + 1])].sort((a, b) => share[b] - share[a] || a - b);
  const path = (i) => { const up = [i]; while (parent[up[0]] >= 0) up.unshift(parent[up[0]]); return up; };
  return { n, parent, inside, share, below, children, path };
}
