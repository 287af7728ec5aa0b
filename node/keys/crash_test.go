package keys

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"skein.io/skein/consensus/keyring"
)

// world is a cluster with real key files, whose leader is killed after any effect.
type world struct {
	t      *testing.T
	rnd    *mrand.Rand
	nodes  []*simNode
	leader int

	rec      *Record // the store
	revision int64
	sealedBy string
	values   map[string]string // by name: the id of the key
	forgot   bool              // the store's history has gone

	left int    // effects until the leader is killed; negative: it is not
	did  string // the effects so far, for people
}

type simNode struct {
	name   string
	path   string
	holder *keyring.Holder
	down   bool
	serves bool // it has followed the record once in this life, so its API takes writes
}

var errKilled = errors.New("killed")

// effect does something that a kill -9 may come before or after.
func (w *world) effect(what string, f func() error) error {
	w.did += " " + what
	if w.left == 0 {
		if w.rnd.IntN(2) == 0 {
			_ = f()
			w.did += "(done,killed)"
		} else {
			w.did += "(killed)"
		}
		return errKilled
	}
	w.left--
	return f()
}

func (w *world) Read(context.Context) (*Record, int64, error) {
	if w.rec == nil {
		return nil, 0, nil
	}
	r, err := Decode(w.rec.Encode())
	return &r, w.revision, err
}

func (w *world) Write(_ context.Context, r Record, revision int64) (n int64, err error) {
	phase := ""
	if r.Rotation != nil {
		phase = string(r.Rotation.Phase)
	}
	err = w.effect("write:"+phase, func() error {
		if revision != w.revision {
			return ErrConflict
		}
		c := r.clone()
		w.rec = &c
		w.revision++
		n = w.revision
		return nil
	})
	return n, err
}

func (w *world) KeysSealedBy(context.Context) (string, error) { return w.sealedBy, nil }

func (w *world) SealKeys(_ context.Context, ring keyring.Ring) error {
	return w.effect("seal", func() error { w.sealedBy = ring.Primary(); return nil })
}

func (w *world) List(context.Context) (out []Replica, err error) {
	for i, n := range w.nodes {
		out = append(out, Replica{ID: n.name, Node: n.name, Voter: true, Self: i == w.leader})
	}
	return out, nil
}

func (w *world) node(name string) *simNode {
	return w.nodes[slices.IndexFunc(w.nodes, func(n *simNode) bool { return n.name == name })]
}

func (w *world) Ask(_ context.Context, r Replica) (Report, error) {
	n := w.node(r.Node)
	if n.down {
		return Report{}, errors.New("down")
	}
	ring, _ := n.holder.Ring()
	return Report{Keys: ring.IDs(), Primary: ring.Primary()}, nil
}

func (w *world) Give(ctx context.Context, r Replica, in keyring.Ring) (Report, error) {
	n := w.node(r.Node)
	err := w.effect("give:"+n.name, func() error {
		if n.down {
			return errors.New("down")
		}
		_, err := n.holder.Update(func(k keyring.Ring) (keyring.Ring, error) { return k.Merge(in) })
		return err
	})
	if err != nil {
		return Report{}, err
	}
	return w.Ask(ctx, r)
}

func (w *world) ring(i int) keyring.Ring {
	r, _ := w.nodes[i].holder.Ring()
	return r
}

func (w *world) Reseal(ctx context.Context, progress func(int)) (Usage, error) {
	n := 0
	for name, key := range w.values {
		ring := w.ring(w.leader)
		if key == ring.Primary() {
			continue
		}
		if key != "" && !ring.Has(key) && w.fetch(w.leader, key) != nil {
			return Usage{}, fmt.Errorf("value %s cannot be read: key %s", name, key)
		}
		if err := w.effect("v", func() error { w.values[name] = ring.Primary(); return nil }); err != nil {
			return Usage{}, err
		}
		n++
		progress(n)
	}
	return w.Count(ctx, false)
}

func (w *world) Count(_ context.Context, whole bool) (Usage, error) {
	u := Usage{ByKey: map[string]int{}, Whole: whole, Revisions: map[string]int64{"system": w.revision}}
	for _, key := range w.values {
		switch key {
		case "":
			u.Plain++
			u.Stale++
		default:
			u.ByKey[key]++
			if key != w.ring(w.leader).Primary() {
				u.Stale++
			}
		}
	}
	return u, nil
}

// fetch gives node i a key that another one that is up has.
func (w *world) fetch(i int, id string) error {
	for j, o := range w.nodes {
		if j == i || o.down || !w.ring(j).Has(id) {
			continue
		}
		only, err := w.ring(j).Only(id)
		if err == nil {
			_, err = w.nodes[i].holder.Update(func(k keyring.Ring) (keyring.Ring, error) { return k.Merge(only) })
		}
		return err
	}
	return fmt.Errorf("nobody has the key %s", id)
}

func (w *world) follow(i int) {
	f := NewFollower(FollowerConfig{Holder: w.nodes[i].holder,
		Read:      func(ctx context.Context) (*Record, error) { r, _, err := w.Read(ctx); return r, err },
		Fetch:     func(_ context.Context, id string) error { return w.fetch(i, id) },
		Compacted: func(context.Context, string, int64) (bool, error) { return w.forgot, nil }})
	_, err := f.Sync(w.t.Context())
	if err != nil && !errors.Is(err, ErrNoRecord) {
		w.t.Fatalf("node %s cannot follow: %v\n%s", w.nodes[i].name, err, w.did)
	}
	w.nodes[i].serves = w.nodes[i].serves || err == nil
}

// restart loads the ring of a node from its file, as after a kill.
func (w *world) restart(n *simNode) {
	h, err := keyring.NewHolder(n.path)
	if err != nil {
		w.t.Fatalf("node %s cannot start: %v", n.name, err)
	}
	n.holder, n.down, n.serves = h, false, false
}

// check: what is stored can be read as long as a majority lives.
func (w *world) check() {
	w.t.Helper()
	needed := map[string]string{w.sealedBy: "the cluster's keys"}
	for name, key := range w.values {
		needed[key] = "value " + name
	}
	if w.rec != nil {
		needed[w.rec.Primary] = "the primary key"
	}
	delete(needed, "")
	for key, what := range needed {
		have := 0
		for _, n := range w.nodes {
			if r, err := keyring.Load(n.path); err == nil && r.Has(key) {
				have++
			}
		}
		if have <= len(w.nodes)/2 {
			w.t.Fatalf("%s needs the key %s, which is on the disks of %d of %d nodes only\n%s", what, key, have, len(w.nodes), w.did)
		}
	}
}

func newWorld(t *testing.T, seed uint64, founded bool) *world {
	w := &world{t: t, rnd: mrand.New(mrand.NewPCG(seed, 1)), values: map[string]string{}, left: -1}
	ring, err := keyring.New(rand.Reader, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		n := &simNode{name: fmt.Sprintf("n%d", i+1), path: filepath.Join(t.TempDir(), keyring.FileName)}
		if founded {
			if err := keyring.Save(n.path, ring); err != nil {
				t.Fatal(err)
			}
		}
		w.restart(n)
		w.nodes = append(w.nodes, n)
	}
	for i := range 5 {
		w.values[fmt.Sprintf("v%d", i)] = ring.Primary()
	}
	if founded {
		w.rec, w.sealedBy, w.revision = &Record{Primary: ring.Primary()}, ring.Primary(), 1
		return w
	}
	for name := range w.values {
		w.values[name] = ""
	}
	return w
}

// run lets leaders work until nothing is to be done, each of them but the last killed after some effects.
func (w *world) run(kills int) {
	for life := 0; life < 500; life++ {
		w.left = -1
		if kills > 0 {
			w.left = w.rnd.IntN(12)
			kills--
		}
		m, err := New(Config{Holder: w.nodes[w.leader].holder, Store: w, Replicas: w, Values: w, Settle: time.Nanosecond})
		if err != nil {
			w.t.Fatal(err)
		}
		for looks := 0; looks < 100; looks++ {
			s, err := m.look(w.t.Context())
			w.check()
			if errors.Is(err, errKilled) {
				break
			}
			if err == nil && s.Action == Wait && s.Reason == "" {
				return
			}
			// The others follow when they come to it; each writes now and then, with the key that it knows.
			for i, n := range w.nodes {
				if n.down {
					continue
				}
				if w.rnd.IntN(3) > 0 {
					w.follow(i)
				}
				if p := w.ring(i).Primary(); n.serves && w.rnd.IntN(8) == 0 {
					w.values[fmt.Sprintf("v%d", w.rnd.IntN(5))] = p
				}
			}
			if w.rec != nil && w.rec.Rotation != nil && w.rec.Rotation.Phase == Retiring && w.rnd.IntN(4) == 0 {
				w.forgot = true
			}
			w.check()
		}
		w.restart(w.nodes[w.leader])
		w.leader = w.rnd.IntN(len(w.nodes))
		w.did += fmt.Sprintf(" | n%d leads:", w.leader+1)
		w.follow(w.leader)
	}
	w.t.Fatalf("it never ends\n%s", w.did)
}

// TestKilledAnywhere rotates keys while leaders are killed before and after every effect. At each moment a majority has every key that is
// needed, and in the end the old key is nowhere.
func TestKilledAnywhere(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	for i := range uint64(36) {
		w := newWorld(t, seed+i, true)
		old := w.rec.Primary
		w.rec.Rotation = &Rotation{ID: "r", Phase: Requested}
		w.revision++
		w.run(int(i % 12))
		for j := range w.nodes {
			w.follow(j)
		}
		if w.rec.Last == nil || w.rec.Last.ID != "r" || w.rec.Last.Refused != "" || w.rec.Primary == old {
			t.Fatalf("seed %d: ended as %+v\n%s", seed+i, w.rec, w.did)
		}
		for j, n := range w.nodes {
			if got := w.ring(j).IDs(); !slices.Equal(got, []string{w.rec.Primary}) {
				t.Fatalf("seed %d: %s has the keys %v, want %s alone\n%s", seed+i, n.name, got, w.rec.Primary, w.did)
			}
		}
		for name, key := range w.values {
			if key != w.rec.Primary {
				t.Fatalf("seed %d: value %s needs key %s\n%s", seed+i, name, key, w.did)
			}
		}
	}
}

// TestEarlierVersion founds the ring of a cluster that has none and plain values.
func TestEarlierVersion(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	for i := range uint64(20) {
		w := newWorld(t, seed+i, false)
		w.run(int(i % 10))
		if w.rec == nil || w.sealedBy != w.rec.Primary {
			t.Fatalf("seed %d: record %+v, the cluster's keys sealed by %q\n%s", seed+i, w.rec, w.sealedBy, w.did)
		}
		for name, key := range w.values {
			if key != w.rec.Primary {
				t.Fatalf("seed %d: value %s is sealed by %q\n%s", seed+i, name, key, w.did)
			}
		}
	}
}

// TestRefused: a dead voter stops a rotation, with its name; force goes on, and the old key stays until the voter has followed.
func TestRefused(t *testing.T) {
	w := newWorld(t, 1, true)
	old := w.rec.Primary
	w.nodes[2].down = true
	w.rec.Rotation = &Rotation{ID: "r1", Phase: Requested}
	w.run(0)
	if l := w.rec.Last; l == nil || l.ID != "r1" || w.rec.Primary != old || len(w.ring(0).IDs()) != 1 {
		t.Fatalf("%+v", w.rec)
	}
	w.rec.Rotation = &Rotation{ID: "r2", Phase: Requested, Force: true}
	m, err := New(Config{Holder: w.nodes[0].holder, Store: w, Replicas: w, Values: w, Settle: time.Nanosecond})
	if err != nil {
		t.Fatal(err)
	}
	for range 40 {
		if _, err := m.look(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.follow(0)
		w.follow(1)
		w.check()
	}
	if w.rec.Primary == old || w.rec.Rotation.Phase != Resealing || w.rec.Rotation.Waits == "" || !w.ring(0).Has(old) {
		t.Fatalf("without n3: %+v %+v", w.rec, w.rec.Rotation)
	}
	w.restart(w.nodes[2])
	w.follow(2)
	w.forgot = true
	w.run(0)
	if w.rec.Last.ID != "r2" || w.rec.Last.Refused != "" || w.ring(2).Has(old) || !w.ring(2).Has(w.rec.Primary) {
		t.Errorf("with n3: %+v, its ring is %v", w.rec, w.ring(2))
	}
}
