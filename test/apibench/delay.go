package main

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"skein.io/skein/test/peers"
)

const (
	// delayWatches are told of each of delayPods creates, which follow each other in delaySteps or at full speed.
	delayWatches, delayPods, delayStep = 200, 200, 50 * time.Millisecond
)

// answers are the times at which creates were answered, by the number of the pod.
type answers struct {
	mu sync.Mutex // guards at
	at map[int]time.Time
}

// delays measures how long after the answer to a create the watches of all pods have its event. The write is committed shortly before the answer.
func (b *comparison) delays(ctx context.Context) error {
	for _, rate := range []struct {
		name    string
		clients int
		step    time.Duration
	}{{"20 a second", 1, delayStep}, {"at full speed", clients, 0}} {
		for _, s := range b.sides {
			late, err := delaysOf(ctx, s, b.made, rate.clients, rate.step)
			if err != nil {
				return err
			}
			for _, q := range []float64{.5, .99} {
				at := late[min(len(late)-1, int(q*float64(len(late))))]
				b.r.put(fmt.Sprintf("event of a create %s for %d watches: ms behind its answer, p%.0f", rate.name, delayWatches, 100*q), s, float64(at.Microseconds())/1000)
			}
		}
		b.made += delayPods
	}
	return nil
}

// delaysOf gives the delays in their order; none is negative.
func delaysOf(ctx context.Context, s *peers.Subject, first, clients int, step time.Duration) (late []time.Duration, err error) {
	k, err := s.Client(protobuf)
	if err != nil {
		return nil, err
	}
	rv, err := revision(ctx, k)
	if err != nil {
		return nil, err
	}
	type arrival struct {
		pod int
		at  time.Time
	}
	arrived := make(chan arrival, delayWatches*delayPods)
	w := watchEach(ctx, k, delayWatches, func(int) metav1.ListOptions { return metav1.ListOptions{ResourceVersion: rv} }, func(event []byte) {
		if n, ok := podNumber(event); ok {
			arrived <- arrival{n, time.Now()}
		}
	})
	defer w.stop()
	if err := pause(ctx, 2*time.Second); err != nil {
		return nil, err
	}
	answered := answers{at: map[int]time.Time{}}
	op := create(first)
	do := op.do
	op.do = func(ctx context.Context, k *kubernetes.Clientset, i int) error {
		if err := pause(ctx, step); err != nil {
			return err
		}
		err := do(ctx, k, i)
		answered.mu.Lock()
		defer answered.mu.Unlock()
		answered.at[first+i] = time.Now()
		return err
	}
	if _, err := runWith(ctx, s, k, op, 0, delayPods, clients); err != nil {
		return nil, err
	}
	for len(late) < delayWatches*delayPods {
		select {
		case a := <-arrived:
			if at, ours := answered.at[a.pod]; ours {
				late = append(late, max(0, a.at.Sub(at)))
			}
		case <-time.After(time.Minute):
			return nil, fmt.Errorf("%s: %d events of %d within a minute", s.Name, len(late), delayWatches*delayPods)
		}
	}
	slices.Sort(late)
	return late, nil
}

// podNumber finds the number of a pod in an encoded event of it.
func podNumber(event []byte) (int, bool) {
	at := bytes.Index(event, []byte("p-"))
	if at < 0 {
		return 0, false
	}
	digits := event[at+2:]
	end := 0
	for end < len(digits) && digits[end] >= '0' && digits[end] <= '9' {
		end++
	}
	n, err := strconv.Atoi(string(digits[:end]))
	return n, err == nil
}
