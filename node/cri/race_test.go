//go:build race

package cri_test

// raceEnabled: the race detector takes memory of its own.
const raceEnabled = true
