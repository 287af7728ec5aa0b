package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// report collects figures in the order of their first mention.
type report struct{ rows []*row }

// better says which way a figure should go.
type better int

const (
	higher better = iota
	lower
)

type row struct {
	name string
	goal better
	by   map[string][]float64 // subject's name -> a value a round
}

func (r *report) put(name, side string, v float64, goal better) {
	i := slices.IndexFunc(r.rows, func(x *row) bool { return x.name == name })
	if i < 0 {
		i = len(r.rows)
		r.rows = append(r.rows, &row{name: name, goal: goal, by: map[string][]float64{}})
	}
	r.rows[i].by[side] = append(r.rows[i].by[side], v)
	fmt.Printf("%s %-75s %-22s %8.1f\n", time.Now().Format(time.TimeOnly), name, side, v)
}

func (r *report) rate(name string, d *side, n int, took time.Duration) {
	r.put(name, d.Name, float64(n)/took.Seconds(), higher)
}

func mean(v []float64) float64 {
	var sum float64
	for _, x := range v {
		sum += x
	}
	return sum / float64(len(v))
}

const (
	skeinSide = "Skein"
	peerSide  = "kube-apiserver + etcd"
)

// text is the report as Markdown: means over the rounds, and how many times better Skein is.
func (r *report) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "| | Skein | upstream | better by |\n|---|---|---|---|\n")
	for _, x := range r.rows {
		own, peer, ratio := "", "", ""
		if v := x.by[skeinSide]; v != nil {
			own = figure(mean(v))
		}
		if v := x.by[peerSide]; v != nil {
			peer = figure(mean(v))
			if s := x.by[skeinSide]; s != nil {
				times := mean(s) / mean(v)
				if x.goal == lower {
					times = 1 / times
				}
				ratio = fmt.Sprintf("%.1fx", times)
			}
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", x.name, own, peer, ratio)
	}
	return b.String()
}

func figure(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.1f", v)
}

// floor is what a fast run must reach at least, in pods a second: a tenth of a quiet machine's, since others may use it.
const floor = 60

func (r *report) verdict(c config) error {
	if !c.fast {
		return nil
	}
	var errs []error
	for _, x := range r.rows {
		if v := x.by[skeinSide]; strings.Contains(x.name, "bound a second") && mean(v) < floor {
			errs = append(errs, fmt.Errorf("%s: %.0f, at least %d", x.name, mean(v), floor))
		}
	}
	return errors.Join(errs...)
}
