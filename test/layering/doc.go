// Package layering holds the test that keeps imports pointing down: which folder may import which, and which
// folder is the one door to each big dependency. The table is the one in ARCHITECTURE.md.
package layering
