package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"skein.io/skein/test/cluster"
)

// report writes what people read: plain lines, each with the time since the start of the demo.
type report struct {
	w     io.Writer
	start time.Time

	mu   sync.Mutex // guards w and last
	last string     // title of the step under way
}

// step begins a part of the demo.
func (r *report) step(title string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = title
	fmt.Fprintf(r.w, "\n%s\n", title)
}

// say tells what happened, now.
func (r *report) say(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(r.w, "%6.1f s  %s\n", time.Since(r.start).Seconds(), fmt.Sprintf(format, args...))
}

// more continues what was said, on lines of its own.
func (r *report) more(text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for line := range strings.Lines(strings.TrimRight(text, "\n")) {
		fmt.Fprintf(r.w, "          %s\n", strings.TrimRight(line, "\n"))
	}
}

// table aligns rows; the first one is the head.
func (r *report) table(rows ...[]string) {
	var width []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(width) {
				width = append(width, 0)
			}
			width[i] = max(width[i], len(cell))
		}
	}
	var b strings.Builder
	for _, row := range rows {
		line := ""
		for i, cell := range row {
			line += fmt.Sprintf("%-*s  ", width[i], cell)
		}
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	r.more(b.String())
}

// fail explains what went wrong and where to look.
func (r *report) fail(err error, lab *cluster.Cluster) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if errors.Is(err, context.Canceled) {
		fmt.Fprintf(r.w, "\nINTERRUPTED in %q; 'make demo-down' removes what is there.\n", r.last)
		return errors.New("interrupted")
	}
	fmt.Fprintf(r.w, "\nFAILED in %q: %v\n", r.last, err)
	if lab != nil {
		for _, n := range lab.Nodes() {
			if _, err := os.Stat(n.LogFile()); err != nil {
				continue // it was not started yet
			}
			fmt.Fprintf(r.w, "\nlog of %s: %s\n", n.Name(), n.LogFile())
			for _, line := range lastWarnings(n.LogFile(), 5) {
				fmt.Fprintf(r.w, "  %s\n", line)
			}
		}
		fmt.Fprintf(r.w, "\nThe nodes stay as they are, to look at; 'make demo-down' removes them.\n")
	}
	return errors.New("the demo did not come to its end")
}

// longest is how much of a log line is shown.
const longest = 300

// lastWarnings gives the last lines of a log that tell of trouble.
func lastWarnings(path string, most int) []string {
	b, err := os.ReadFile(path)
	if err != nil {
		return []string{err.Error()}
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") || strings.HasPrefix(line, "skein:") || strings.HasPrefix(line, "panic:") {
			if line = strings.TrimSpace(line); len(line) > longest {
				line = line[:longest] + "..."
			}
			out = append(out, line)
		}
	}
	return out[max(0, len(out)-most):]
}

// figures is what the demo measured; times in seconds, sizes in MB (10^6 bytes). It is the format of the file.
type figures struct {
	Machine struct {
		CPUs   int    `json:"cpus"`
		Kernel string `json:"kernel"`
	} `json:"machine"`
	// OneNodeReady is from the start of the first daemon to a Ready node; ThreeNodesReady from there to three, Joined for each of
	// the joiners; ThreeVoters until the store has three voters.
	OneNodeReady    float64            `json:"oneNodeReadySeconds"`
	ThreeNodesReady float64            `json:"threeNodesReadySeconds"`
	ThreeVoters     float64            `json:"threeVotersSeconds"`
	Joined          map[string]float64 `json:"joinedSeconds"`
	// DeployReady is from "apply" to six Ready pods.
	DeployReady float64 `json:"deployReadySeconds"`
	// Requests over new connections, by way; p50 and p99 in milliseconds.
	Requests map[string]requests `json:"requests"`
	// Kill is what followed the power cut of the leader; all from the cut on.
	Kill struct {
		Node        string  `json:"node"`
		NewLeader   float64 `json:"newLeaderSeconds"`
		FirstWrite  float64 `json:"firstWriteSeconds"`
		Detected    float64 `json:"detectedSeconds"` // by gossip on both others
		NotReady    float64 `json:"nodeNotReadySeconds"`
		PodsReady   float64 `json:"allPodsReadySeconds"`
		ClusterIP   outage  `json:"clusterIP"`
		NodePort    outage  `json:"nodePort"`
		FailedWrite int     `json:"failedWrites"`
	} `json:"kill"`
	// Back is the node's return, from its start on.
	Back struct {
		Ready     float64 `json:"readySeconds"`
		Voter     float64 `json:"voterSeconds"`
		Endpoints float64 `json:"firstAnswerFromItSeconds"` // from "scale" on
	} `json:"back"`
	// Unplug is a node cut off for a moment: from then on until the others gave it up, and from its return to its pods' first answer.
	Unplug struct {
		Node      string  `json:"node"`
		Detected  float64 `json:"detectedSeconds"`
		Endpoints float64 `json:"endpointsBackSeconds"`
		Moved     int     `json:"podsMoved"`
		Requests  outage  `json:"clusterIP"`
	} `json:"unplug"`
	Idle     map[string]idle    `json:"idle"` // by node
	Binaries map[string]float64 `json:"binariesMB"`
	Total    float64            `json:"totalSeconds"`
}

type requests struct {
	Sent   int     `json:"sent"`
	Failed int     `json:"failed"`
	P50    float64 `json:"p50Millis"`
	P99    float64 `json:"p99Millis"`
	Pods   int     `json:"pods"`
}

func (f *figures) write(path string) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
