package chaos

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand"
	"slices"
	"strings"
	"syscall"
	"time"
)

// fault is something that goes wrong. inject returns what ends it. The world may
// be in any state, also without a leader.
type fault struct {
	inject func(ctx context.Context, w *world, r *rand.Rand) (heal func() error, what string, err error)
	// hold is how long it lasts, from one to two times that.
	hold time.Duration
	// deadly: a process may end by itself.
	deadly bool
	// healthy: it is done once the faults before it have ended.
	healthy bool
}

func nothing() error { return nil }

// victim is the leader of a random shard, or any node without one.
func (w *world) victim(ctx context.Context, r *rand.Rand) *node {
	if n := w.leader(ctx, shardNames[r.Intn(len(shardNames))]); n != nil {
		return n
	}
	return w.nodes[r.Intn(len(w.nodes))]
}

// follower is a node that does not lead the system shard.
func (w *world) follower(ctx context.Context, r *rand.Rand) *node {
	l := w.leader(ctx, "system")
	for _, i := range r.Perm(len(w.nodes)) {
		if w.nodes[i] != l && !w.nodes[i].spare {
			return w.nodes[i]
		}
	}
	return w.nodes[0]
}

// some nodes, at least one, at most all but one.
func (w *world) some(r *rand.Rand) []*node {
	var out []*node
	for _, i := range r.Perm(len(w.nodes))[:1+r.Intn(len(w.nodes)-1)] {
		out = append(out, w.nodes[i])
	}
	return out
}

func names(ns []*node) string {
	var out []string
	for _, n := range ns {
		out = append(out, n.name)
	}
	return strings.Join(out, ",")
}

func (w *world) rest(of []*node) (out []*node) {
	for _, n := range w.nodes {
		if !slices.Contains(of, n) {
			out = append(out, n)
		}
	}
	return out
}

// restart what does not run.
func restart(ns ...*node) error {
	var errs []error
	for _, n := range ns {
		if !n.lab.Running() {
			errs = append(errs, n.start())
		}
	}
	return errors.Join(errs...)
}

func each(ns []*node, f func(*node) error) error {
	var errs []error
	for _, n := range ns {
		errs = append(errs, f(n))
	}
	return errors.Join(errs...)
}

type pick func(context.Context, *world, *rand.Rand) []*node

func aLeader(ctx context.Context, w *world, r *rand.Rand) []*node { return []*node{w.victim(ctx, r)} }
func aFollower(ctx context.Context, w *world, r *rand.Rand) []*node {
	return []*node{w.follower(ctx, r)}
}
func several(_ context.Context, w *world, r *rand.Rand) []*node { return w.some(r) }
func all(_ context.Context, w *world, _ *rand.Rand) []*node     { return w.nodes }

// kill processes with SIGKILL, and start them again.
func kill(p pick) func(context.Context, *world, *rand.Rand) (func() error, string, error) {
	return func(ctx context.Context, w *world, r *rand.Rand) (func() error, string, error) {
		ns := p(ctx, w, r)
		return func() error { return restart(ns...) }, names(ns), each(ns, (*node).kill)
	}
}

// power is cut: processes die, and what was not synchronised may be lost.
func power(p pick) func(context.Context, *world, *rand.Rand) (func() error, string, error) {
	return func(ctx context.Context, w *world, r *rand.Rand) (func() error, string, error) {
		ns := p(ctx, w, r)
		// Slow for a moment, so that much is under way when it happens.
		for _, n := range ns {
			n.disk.SetDelays(time.Duration(r.Intn(200))*time.Millisecond, 0)
		}
		if err := sleep(ctx, time.Duration(r.Intn(300))*time.Millisecond); err != nil {
			return nothing, "", err
		}
		return func() error { return restart(ns...) }, names(ns), each(ns, func(n *node) error {
			err := n.powerCut(r.Int63())
			n.disk.SetDelays(0, 0)
			return err
		})
	}
}

// pause processes with SIGSTOP.
func pause(p pick) func(context.Context, *world, *rand.Rand) (func() error, string, error) {
	return func(ctx context.Context, w *world, r *rand.Rand) (func() error, string, error) {
		ns := p(ctx, w, r)
		signal := func(s syscall.Signal) error {
			return each(ns, func(n *node) error {
				if !n.lab.Running() {
					return nil
				}
				return n.lab.Signal(s)
			})
		}
		return func() error { return signal(syscall.SIGCONT) }, names(ns), signal(syscall.SIGSTOP)
	}
}

// cut the network between two sides.
func cut(p pick) func(context.Context, *world, *rand.Rand) (func() error, string, error) {
	return func(ctx context.Context, w *world, r *rand.Rand) (func() error, string, error) {
		side := p(ctx, w, r)
		return w.healNet, names(side), w.partition(side)
	}
}

func (w *world) healNet() error { return w.lab.Heal(context.Background()) }

func (w *world) partition(side []*node) error {
	return w.lab.Partition(context.Background(), strings.Split(names(side), ","), strings.Split(names(w.rest(side)), ","))
}

// oneWay drops what a node sends, or what it is sent.
func oneWay(out bool) func(context.Context, *world, *rand.Rand) (func() error, string, error) {
	return func(ctx context.Context, w *world, r *rand.Rand) (func() error, string, error) {
		n := w.victim(ctx, r)
		var errs []error
		for _, o := range w.rest([]*node{n}) {
			from, to := n.name, o.name
			if !out {
				from, to = to, from
			}
			errs = append(errs, w.lab.Mute(context.Background(), from, to))
		}
		return w.healNet, n.name, errors.Join(errs...)
	}
}

// bridge leaves one node that reaches all others, which do not reach each other.
func bridge(_ context.Context, w *world, r *rand.Rand) (func() error, string, error) {
	order := r.Perm(len(w.nodes))
	var errs []error
	half := len(order) / 2
	for _, a := range order[:half] {
		for _, b := range order[half+1:] {
			errs = append(errs, w.lab.Cut(context.Background(), w.nodes[a].name, w.nodes[b].name))
		}
	}
	return w.healNet, "over " + w.nodes[order[half]].name, errors.Join(errs...)
}

// flap cuts a node off and back, again and again.
func flap(ctx context.Context, w *world, r *rand.Rand) (func() error, string, error) {
	n := w.victim(ctx, r)
	stop, done := make(chan struct{}), make(chan error, 1)
	pauses := make([]time.Duration, 64)
	for i := range pauses {
		pauses[i] = time.Duration(50+r.Intn(700)) * time.Millisecond
	}
	go func() {
		var err error
		for i := 0; err == nil; i++ {
			if i%2 == 0 {
				err = w.partition([]*node{n})
			} else {
				err = w.healNet()
			}
			select {
			case <-stop:
				done <- err
				return
			case <-time.After(pauses[i%len(pauses)]):
			}
		}
		<-stop
		done <- err
	}()
	return func() error { close(stop); return errors.Join(<-done, w.healNet()) }, n.name, nil
}

// jump moves wall clocks forth and back.
func jump(_ context.Context, w *world, r *rand.Rand) (func() error, string, error) {
	what := ""
	var moved []*node
	for _, n := range w.some(r) {
		if !n.lab.Running() {
			continue
		}
		off := []time.Duration{time.Second, 30 * time.Second, time.Hour, 400 * 24 * time.Hour}[r.Intn(4)]
		if r.Intn(2) == 0 {
			off = -off
		}
		if err := n.jump(off); err != nil {
			return nothing, "", err
		}
		moved = append(moved, n)
		what += fmt.Sprintf("%s by %v ", n.name, off)
	}
	return func() error {
		return each(moved, func(n *node) error {
			if n.clock == nil || !n.lab.Running() {
				return nil
			}
			return n.clock.Set(0)
		})
	}, what, nil
}

// full disk, at once or after a little.
func full(p pick) func(context.Context, *world, *rand.Rand) (func() error, string, error) {
	return func(ctx context.Context, w *world, r *rand.Rand) (func() error, string, error) {
		ns := p(ctx, w, r)
		for _, n := range ns {
			n.disk.SetFree(int64(r.Intn(2)) * int64(r.Intn(256<<10)))
		}
		return func() error {
			for _, n := range ns {
				n.disk.SetFree(-1)
			}
			return restart(ns...)
		}, names(ns), nil
	}
}

// slow disk: each fsync takes long.
func slow(p pick) func(context.Context, *world, *rand.Rand) (func() error, string, error) {
	return func(ctx context.Context, w *world, r *rand.Rand) (func() error, string, error) {
		ns := p(ctx, w, r)
		d := time.Duration(20+r.Intn(600)) * time.Millisecond
		for _, n := range ns {
			n.disk.SetDelays(d, 0)
		}
		return func() error {
			for _, n := range ns {
				n.disk.SetDelays(0, 0)
			}
			return nil
		}, names(ns) + " " + d.String(), nil
	}
}

// badSync lets fsyncs fail; then the power goes, as it would on such a disk.
func badSync(ctx context.Context, w *world, r *rand.Rand) (func() error, string, error) {
	n := w.victim(ctx, r)
	n.disk.FailSyncs(1 + r.Intn(3))
	seed := r.Int63()
	return func() error {
		n.disk.FailSyncs(0)
		return errors.Join(n.powerCut(seed), restart(n))
	}, n.name, nil
}

// move hands leaderships over.
func move(ctx context.Context, w *world, r *rand.Rand) (func() error, string, error) {
	what := ""
	for _, s := range shardNames {
		l := w.leader(ctx, s)
		if l == nil {
			continue
		}
		what += s + " from " + l.name + " "
		if err := l.admin(ctx, "/transfer", map[string][]string{"shard": {s}}, nil); err != nil {
			what += "(" + err.Error() + ") "
		}
	}
	return nothing, what, nil
}

// replace makes a spare a voter in the place of another, which becomes the spare.
func replace(ctx context.Context, w *world, r *rand.Rand) (func() error, string, error) {
	var spare, out *node
	for _, i := range r.Perm(len(w.nodes)) {
		if n := w.nodes[i]; n.spare {
			spare = n
		} else {
			out = n
		}
	}
	if spare == nil {
		return nothing, "", errors.New("no spare")
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	spare.life.Add(1) // its replicas are new ones, which begin with nothing
	for _, s := range shardNames {
		if err := w.addVoter(ctx, s, spare); err != nil {
			return nothing, "", err
		}
		if l := w.leader(ctx, s); l == out { // etcd and we let a leader go only when it leads no more
			_ = l.admin(ctx, "/transfer", map[string][]string{"shard": {s}}, nil)
		}
		if err := w.removeVoter(ctx, s, out); err != nil {
			return nothing, "", err
		}
	}
	spare.spare, out.spare = false, true
	return nothing, out.name + " by " + spare.name, nil
}

// backup holds all shards for a moment, in the midst of writes.
func backup(ctx context.Context, w *world, r *rand.Rand) (func() error, string, error) {
	n := w.victim(ctx, r)
	var how string
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := n.admin(ctx, "/cut", nil, &how); err != nil {
		how = err.Error() // others fail at the same time
	}
	return nothing, n.name + " " + how, nil
}

var faults = map[string]fault{
	"kill-leader":      {inject: kill(aLeader), hold: 700 * time.Millisecond},
	"kill-follower":    {inject: kill(aFollower), hold: time.Second},
	"kill-some":        {inject: kill(several), hold: time.Second},
	"kill-all":         {inject: kill(all), hold: 200 * time.Millisecond},
	"behind":           {inject: kill(aFollower), hold: 4 * time.Second},
	"power-leader":     {inject: power(aLeader), hold: 500 * time.Millisecond},
	"power-some":       {inject: power(several), hold: 500 * time.Millisecond},
	"power-all":        {inject: power(all), hold: 100 * time.Millisecond},
	"pause-leader":     {inject: pause(aLeader), hold: 2 * time.Second},
	"pause-some":       {inject: pause(several), hold: time.Second},
	"blink":            {inject: pause(all), hold: 300 * time.Millisecond},
	"isolate-leader":   {inject: cut(aLeader), hold: 1500 * time.Millisecond},
	"isolate-follower": {inject: cut(aFollower), hold: 1500 * time.Millisecond},
	"partition":        {inject: cut(several), hold: 1500 * time.Millisecond},
	"mute":             {inject: oneWay(true), hold: 1500 * time.Millisecond},
	"deaf":             {inject: oneWay(false), hold: 1500 * time.Millisecond},
	"bridge":           {inject: bridge, hold: 1500 * time.Millisecond},
	"flap":             {inject: flap, hold: 2 * time.Second},
	"clock":            {inject: jump, hold: time.Second},
	"full-leader":      {inject: full(aLeader), hold: 1500 * time.Millisecond, deadly: true},
	"full-some":        {inject: full(several), hold: 1500 * time.Millisecond, deadly: true},
	"slow-leader":      {inject: slow(aLeader), hold: 1500 * time.Millisecond},
	"slow-some":        {inject: slow(several), hold: 1500 * time.Millisecond},
	"bad-sync":         {inject: badSync, hold: 500 * time.Millisecond, deadly: true},
	"transfer":         {inject: move, hold: 100 * time.Millisecond},
	"replace":          {inject: replace, hold: 100 * time.Millisecond, healthy: true},
	"backup":           {inject: backup, hold: 200 * time.Millisecond},
}

// step of a schedule.
type step struct {
	fault        string
	seed         int64
	before, hold time.Duration
	// overlap: the next step begins before this one ends.
	overlap bool
}

// schedule makes a schedule of about the given length from a seed. Pure.
func schedule(seed int64, from []string, length time.Duration) (out []step) {
	r := rand.New(rand.NewSource(seed))
	order := r.Perm(len(from)) // each once before one comes twice
	for i, at := 0, time.Duration(0); at < length; i++ {
		name := from[order[i%len(order)]]
		f := faults[name]
		s := step{fault: name, seed: r.Int63(), before: time.Duration(100+r.Intn(900)) * time.Millisecond,
			hold: f.hold + time.Duration(r.Int63n(int64(f.hold))), overlap: r.Intn(4) == 0}
		at += s.before
		if !s.overlap {
			at += s.hold
		}
		out = append(out, s)
	}
	return out
}

// torture runs a schedule; afterwards nothing is wrong any more.
func (w *world) torture(ctx context.Context, steps []step) error {
	var heals []func() error
	deadly := false
	heal := func() (err error) {
		for _, h := range slices.Backward(heals) {
			err = errors.Join(err, h())
		}
		heals, deadly = nil, false
		return err
	}
	for _, s := range steps {
		if err := sleep(ctx, s.before); err != nil {
			return err
		}
		f := faults[s.fault]
		if f.healthy {
			was := deadly
			if err := errors.Join(heal(), w.survivors(was)); err != nil {
				return err
			}
		}
		deadly = deadly || f.deadly
		begun := w.hist.Now()
		h, what, err := f.inject(ctx, w, rand.New(rand.NewSource(s.seed)))
		heals = append(heals, h)
		w.t.Logf("%8.3fs %s %s for %v", begun.Seconds(), s.fault, what, s.hold)
		if err != nil {
			return errors.Join(fmt.Errorf("%s: %w", s.fault, err), heal())
		}
		if s.overlap {
			continue
		}
		if err := sleep(ctx, s.hold); err != nil {
			return errors.Join(err, heal())
		}
		was := deadly
		if err := heal(); err != nil {
			return err
		}
		if err := w.survivors(was); err != nil {
			return err
		}
	}
	return errors.Join(heal(), w.survivors(true))
}

// survivors starts what has ended by itself, which is an error unless the faults
// excuse it.
func (w *world) survivors(excused bool) error {
	for _, n := range w.nodes {
		if n.lab.Running() {
			continue
		}
		if !excused {
			return fmt.Errorf("the process of %s has ended by itself, see its log", n.name)
		}
		if err := n.start(); err != nil {
			return err
		}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func faultNames() []string { return slices.Sorted(maps.Keys(faults)) }
