package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"skein.io/skein/test/peers"
)

// report collects figures in the order of their first mention.
type report struct {
	rows []*row
}

type row struct {
	name  string
	ratio bool
	by    map[string]float64 // subject's name
}

func (r *report) put(name string, s *peers.Subject, v float64) {
	i := slices.IndexFunc(r.rows, func(x *row) bool { return x.name == name })
	if i < 0 {
		i = len(r.rows)
		r.rows = append(r.rows, &row{name: name, by: map[string]float64{}})
	}
	r.rows[i].by[s.Name] = v
	fmt.Printf("%s %-70s %-22s %8.1f\n", time.Now().Format(time.TimeOnly), name, s.Name, v)
}

func (r *report) cost(name string, s *peers.Subject, c cost) {
	r.put("CPU, us: "+name, s, c.each())
	r.rows[slices.IndexFunc(r.rows, func(x *row) bool { return x.name == "CPU, us: "+name })].ratio = true
}

func (r *report) memory(what string, s *peers.Subject, m peers.Memory) {
	r.put(what+": anonymous MB", s, m.Anon)
	r.put(what+": resident MB", s, m.RSS)
}

func (r *report) get(name string) (float64, bool) {
	for _, x := range r.rows {
		if x.name == name {
			v, ok := x.by["Skein"]
			return v, ok
		}
	}
	return 0, false
}

// text is the report as Markdown.
func (r *report) text(c config) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| | Skein | kube-apiserver + etcd | ratio |\n|---|---|---|---|\n")
	for _, x := range r.rows {
		skein, ok := x.by["Skein"]
		own, peer, ratio := "", "", ""
		if ok {
			own = figure(skein)
		}
		if v, there := x.by["kube-apiserver + etcd"]; there {
			peer = figure(v)
			if ok && v > 0 {
				ratio = fmt.Sprintf("%.2f", skein/v)
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

// limits of a fast run: far enough from what is measured on a quiet machine for a busy one to pass.
var limits = map[string]float64{
	"idle: anonymous MB": 80, "idle: resident MB": 170, overhead: 60, informerPeak: 330,
}

func (r *report) verdict(c config) error {
	if !c.fast {
		return nil
	}
	var errs []error
	for name, most := range limits {
		if v, ok := r.get(name); ok && v > most {
			errs = append(errs, fmt.Errorf("%s: %.1f, at most %.1f", name, v, most))
		}
	}
	return errors.Join(errs...)
}
