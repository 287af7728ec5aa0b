package main

import (
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"time"

	"skein.io/skein/test/cputime"
)

// report prints Markdown.
type report struct {
	w       io.Writer
	targets []*target
	rows    []memoryRow
}

type memoryRow struct {
	when string
	of   []memory
	name []string
}

func (p *report) printf(format string, args ...any) {
	fmt.Fprintf(p.w, format, args...) //nolint:errcheck // a report that cannot be written is seen
}

const mib = 1 << 20

// machine prints what the machine can do by itself.
func (p *report) machine(dir string) error {
	grow, over, err := syncRate(dir, valueSize+256, time.Second)
	if err != nil {
		return err
	}
	p.printf("%s, %d CPUs, three processes of each system and the client on them; values of %d bytes.\n", time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), valueSize)
	p.printf("The disk alone makes %.0f writes/s of that size durable when they are appended to a file, %.0f/s into a file that exists.\n\n", grow, over)
	return nil
}

func (p *report) head(ts []*target) {
	p.targets = ts
	base := ts[0].name
	h := []string{"workload", "clients", base + " ops/s"}
	for _, t := range ts[1:] {
		h = append(h, t.name+" / "+base, "(lowest-highest)")
	}
	for _, col := range []string{"p50 ms", "p99 ms", "CPU us/op", "flushes/op"} {
		h = append(h, col)
	}
	p.printf("| %s |\n|%s\n", strings.Join(h, " | "), strings.Repeat("---|", len(h)))
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	if len(v) == 0 {
		return 0
	}
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

func column(rs []result, f func(result) float64) float64 {
	var v []float64
	for _, r := range rs {
		v = append(v, f(r))
	}
	return median(v)
}

// row prints a cell and returns the median ratios, the base's first.
func (p *report) row(workload string, clients int, results [][]result) []float64 {
	base := results[0]
	ratios := []float64{1}
	cols := []string{workload, fmt.Sprint(clients), fmt.Sprintf("%.0f", column(base, func(r result) float64 { return r.ops }))}
	for _, rs := range results[1:] {
		if len(rs) == 0 {
			ratios, cols = append(ratios, 0), append(cols, "-", "-")
			continue
		}
		var v []float64
		for i, r := range rs {
			v = append(v, r.ops/base[i].ops) // neighbours in time
		}
		ratios = append(ratios, median(v))
		cols = append(cols, fmt.Sprintf("**%.2f**", median(v)), fmt.Sprintf("%.2f-%.2f", slices.Min(v), slices.Max(v)))
	}
	each := func(format string, f func(result) float64) string {
		var v []string
		for _, rs := range results {
			if len(rs) == 0 {
				v = append(v, "-")
				continue
			}
			v = append(v, fmt.Sprintf(format, column(rs, f)))
		}
		return strings.Join(v, " / ")
	}
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	cols = append(cols,
		each("%.2f", func(r result) float64 { return ms(r.p50) }), each("%.2f", func(r result) float64 { return ms(r.p99) }),
		each("%.0f", func(r result) float64 { return float64(r.cpu.Microseconds()) }), each("%.2f", func(r result) float64 { return r.flushes }))
	var errs int64
	for _, rs := range results {
		for _, r := range rs {
			errs += r.errs
		}
	}
	p.printf("| %s |", strings.Join(cols, " | "))
	if errs > 0 {
		p.printf(" %d requests failed", errs)
	}
	p.printf("\n")
	return ratios
}

// idle remembers memory, and prints the CPU of doing nothing.
func (p *report) idle(cs []*cluster) error {
	const look = 5 * time.Second
	var before []time.Duration
	for _, c := range cs {
		d, err := cputime.Of(c.pids())
		if err != nil {
			return err
		}
		before = append(before, d)
	}
	time.Sleep(look)
	for i, c := range cs {
		d, err := cputime.Of(c.pids())
		if err != nil {
			return err
		}
		p.printf("An idle process of %s uses %.2f %% of a CPU. ", c.name, 100*(d-before[i]).Seconds()/look.Seconds()/float64(len(c.procs)))
	}
	p.printf("\n\n")
	return p.memory("idle", cs)
}

func (p *report) memory(when string, cs []*cluster) error {
	r := memoryRow{when: when}
	for _, c := range cs {
		m, err := memoryOf(c.pids())
		if err != nil {
			return err
		}
		r.of, r.name = append(r.of, m), append(r.name, c.name)
	}
	p.rows = append(p.rows, r)
	return nil
}

func (p *report) memoryTable() {
	p.printf("\n| memory of a process, MiB |")
	for _, n := range p.rows[0].name {
		p.printf(" %s RSS | of it anonymous |", n)
	}
	p.printf("\n|---|%s\n", strings.Repeat("---|---|", len(p.rows[0].of)))
	for _, r := range p.rows {
		p.printf("| %s |", r.when)
		for _, m := range r.of {
			p.printf(" %.0f | %.0f |", m.rss/mib, m.anon/mib)
		}
		p.printf("\n")
	}
}
