package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"skein.io/skein/test/cputime"
	"skein.io/skein/test/peers"
)

const (
	overhead = "1,000 watches of other nodes: % more CPU for a create"
	// nodeWatches is how many there are, phase how many creates are measured at a time, after warming ones.
	nodeWatches, phase, warming = 1000, 1000, 50
	// cycle is how many creates make the garbage that one collection takes, which costs as much as a hundred of them: each round begins at another
	// place of it, else all would have one collection too many, or all one too few.
	cycle = 600
)

// rounds of creates without and with the watches, of which the one in the middle counts: a single one tells more of the collector and of the rest of the machine
// than of them.
func (b *comparison) rounds() int {
	if b.fast {
		return 3
	}
	return 7
}

// byNode measures what 1,000 watches of nodes cost the creation of a pod that is on none of them: the processor time of the servers alone, less what they use when
// nobody asks for anything, without what opening the watches takes, nor what that leaves to collect.
func (b *comparison) byNode(ctx context.Context) error {
	before := b.made
	idle, err := b.idleRate(ctx)
	if err != nil {
		return err
	}
	each := make([][2][]float64, len(b.sides)) // without, with: of each round, in microseconds
	more := make([][]float64, len(b.sides))    // percent
	for r := range b.rounds() {
		var round [2][]cost
		for i := range round {
			with := (i + r) % 2 // the stores grow: once these are first, once those
			if round[with], err = b.phase(ctx, r, with == 1); err != nil {
				return err
			}
		}
		for j, s := range b.sides {
			var us [2]float64
			for with := range us {
				c := round[with][j]
				c.cpu -= time.Duration(idle[j] * float64(c.wall))
				us[with] = c.each()
				each[j][with] = append(each[j][with], us[with])
			}
			more[j] = append(more[j], 100*(us[1]/us[0]-1))
			fmt.Fprintf(os.Stderr, "%s: round %d: %.0f us without, %.0f us with %d watches\n", s.Name, r+1, us[0], us[1], nodeWatches)
		}
	}
	for i, s := range b.sides {
		b.r.put("create with 1,000 watches of other nodes, us", s, median(each[i][1]))
		b.r.put("create without, us", s, median(each[i][0]))
		b.r.put(overhead, s, median(more[i]))
	}
	_, err = b.turns(ctx, remove, before, b.made-before) // so that what follows has as many pods as was asked for
	b.made = before
	return err
}

func median(of []float64) float64 {
	of = slices.Sorted(slices.Values(of))
	return (of[(len(of)-1)/2] + of[len(of)/2]) / 2
}

// idleRate is how much of a processor each side uses when nobody asks for anything.
func (b *comparison) idleRate(ctx context.Context) ([]float64, error) {
	const d = 5 * time.Second
	if err := pause(ctx, time.Second); err != nil { // what there was to do
		return nil, err
	}
	rates := make([]float64, len(b.sides))
	began := time.Now()
	for i, s := range b.sides {
		used, err := cputime.Of(s.Pids())
		if err != nil {
			return nil, err
		}
		rates[i] = -float64(used)
	}
	if err := pause(ctx, d); err != nil {
		return nil, err
	}
	for i, s := range b.sides {
		used, err := cputime.Of(s.Pids())
		if err != nil {
			return nil, err
		}
		rates[i] = (rates[i] + float64(used)) / float64(time.Since(began))
	}
	return rates, nil
}

// phase makes pods on servers that have no garbage when it begins.
func (b *comparison) phase(ctx context.Context, round int, watched bool) (costs []cost, err error) {
	var ws []*watchers
	name := "no-watch-nodes"
	if watched {
		name = "watch-nodes"
		var stop func()
		if ws, stop, err = b.open(ctx, nodeWatches, func(i int) string { return fmt.Sprintf("spec.nodeName=n%d", i) }); err != nil {
			return nil, err
		}
		defer stop()
	} else if err := pause(ctx, time.Second); err != nil {
		return nil, err
	}
	for _, s := range b.sides {
		if err := peers.Fetch(s.Config, "/debug/pprof/heap?gc=1", os.DevNull); err != nil {
			return nil, err
		}
	}
	if _, err := b.create(ctx, warming+round*cycle/b.rounds()); err != nil {
		return nil, err
	}
	if costs, err = b.create(ctx, phase); err != nil {
		return nil, err
	}
	if b.profiles != "" && round == b.rounds()-1 { // of other creates: it costs something
		end := b.profile(name)
		_, err = b.create(ctx, phase)
		end()
		for _, what := range []string{"heap?gc=1", "goroutine?debug=1"} {
			fetchProfile(b.sides[0].Config, "/debug/pprof/"+what, filepath.Join(b.profiles, name+"."+what[:4]))()
		}
	}
	if err == nil && watched {
		err = b.alive(ws)
	}
	return costs, err
}

// remove deletes pods: nobody runs them, so they go at once.
var remove = operation{"delete", 1, protobuf, func(ctx context.Context, k *kubernetes.Clientset, i int) error {
	return k.CoreV1().Pods(namespace).Delete(ctx, podName(i), *metav1.NewDeleteOptions(0))
}}
