// Package oracle is a module of its own that asks kube-scheduler's own plugins and Skein's placement the same question,
// over clusters and pods made up from a seed, and compares the answers:
//
//   - for every node the filter that refuses it, its reasons' texts, and whether evicting pods could help;
//   - for every feasible node the weighted score of every plugin, and so the ranking before the tie is broken;
//   - the message that is written to the pod;
//   - for a pod that fits nowhere: on which nodes eviction would make room, the victims in their order, how many disruption
//     budgets that breaks, which node is taken, and what is said if there is none;
//   - of dynamic resources, which devices the pod's claims get on its node, which claim is made for its extended resources, and
//     which one is given up if it fits nowhere.
//
// Where the answers differ on purpose is listed with the reason in accepted.md; nothing else is let through. `make oracle`
// asks about 20,000 clusters; CASES and SEED change that. A failure prints its seed and writes the smallest cluster that
// still fails to out/oracle.
package oracle
