//go:build race

package api

// raceEnabled: the race detector makes everything many times as dear.
const raceEnabled = true
