package keys

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"skein.io/skein/consensus/keyring"
)

// Replica is a node that holds a replica of the store.
type Replica struct {
	ID    string // its NodeHostID
	Node  string // its name
	Voter bool   // of any shard
	Self  bool
}

// Report is what a replica says of its ring.
type Report struct {
	Keys    []string `json:"keys"` // ids
	Primary string   `json:"primary"`
}

// ErrConflict says that somebody else wrote the record in between.
var ErrConflict = errors.New("the record of the cluster's keys was changed by another")

// Store is what the Manager needs of the store. Writes act for the leader's term.
type Store interface {
	// Read gives the record and its revision, linearizably; nil and 0 when there is none.
	Read(ctx context.Context) (*Record, int64, error)
	// Write replaces the record if it still has the revision (0: is not there); ErrConflict otherwise. It returns the new revision.
	Write(ctx context.Context, r Record, revision int64) (int64, error)
	// KeysSealedBy is the id of the key that seals the cluster's own keys, "" when they are not sealed.
	KeysSealedBy(ctx context.Context) (string, error)
	// SealKeys seals them with the ring's primary key.
	SealKeys(ctx context.Context, ring keyring.Ring) error
}

// Replicas is how the Manager reaches the others.
type Replicas interface {
	// List gives all nodes that hold a replica of any shard, linearizably.
	List(ctx context.Context) ([]Replica, error)
	// Ask asks one for its ring's ids.
	Ask(ctx context.Context, r Replica) (Report, error)
	// Give makes one add the keys to its ring, durably.
	Give(ctx context.Context, r Replica, ring keyring.Ring) (Report, error)
}

// Values is the stored data.
type Values interface {
	// Reseal writes stale values anew; progress is told how many have been done so far.
	Reseal(ctx context.Context, progress func(done int)) (Usage, error)
	// Count looks at all values, or only at those of resources that are sealed.
	Count(ctx context.Context, whole bool) (Usage, error)
}

// Config of a Manager.
type Config struct {
	Holder   *keyring.Holder
	Store    Store
	Replicas Replicas
	Values   Values
	// Changed gets a value after the record may have changed.
	Changed <-chan struct{}
	// Interval between two looks while something is to be done; default 1 s.
	Interval time.Duration
	// Settle, see the constant; default Settle.
	Settle time.Duration
	// Logger; nil discards.
	Logger *slog.Logger
}

const (
	askTimeout = 3 * time.Second // for an answer of a replica
	// progressEvery is how often the progress of resealing is written to the store.
	progressEvery = 2 * time.Second
	// keepRetired is how many retired keys the record remembers, for replicas that come back late.
	keepRetired = keyring.MaxKeys
	// idleLook is how often a Manager without work looks, should it have missed a change.
	idleLook = time.Minute
)

// Manager carries rotations out. Run it on the cluster's leader, once a term.
type Manager struct {
	cfg Config
	log *slog.Logger

	// Of this term; used by Run's goroutine only.
	usage   *Usage
	counted time.Duration
	usageOf string    // the primary key that usage was taken under
	agreed  time.Time // since when all members seal with agreedOn; zero: they do not
	agreeOn string
	said    string
}

// New returns a Manager; it does nothing by itself.
func New(cfg Config) (*Manager, error) {
	if cfg.Holder == nil || cfg.Store == nil || cfg.Replicas == nil || cfg.Values == nil {
		return nil, errors.New("keys: Holder, Store, Replicas and Values have to be set")
	}
	if cfg.Interval == 0 {
		cfg.Interval = time.Second
	}
	if cfg.Settle == 0 {
		cfg.Settle = Settle
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Manager{cfg: cfg, log: cfg.Logger}, nil
}

// Run works until ctx ends.
func (m *Manager) Run(ctx context.Context) {
	for ctx.Err() == nil {
		pause := m.cfg.Interval
		step, err := m.look(ctx)
		switch {
		case err != nil && ctx.Err() == nil && !errors.Is(err, ErrConflict):
			m.say("cannot go on: " + err.Error())
		case err == nil && step.Action == Wait && step.Reason == "":
			pause = idleLook
		case err == nil && step.Action != Wait:
			continue
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-m.cfg.Changed:
		case <-t.C:
		}
		t.Stop()
	}
}

// say logs what is new.
func (m *Manager) say(what string) {
	if what != m.said {
		m.log.Info("cluster keys", "what", what)
	}
	m.said = what
}

// look observes, decides and acts once.
func (m *Manager) look(ctx context.Context) (Step, error) {
	o, revision, err := m.observe(ctx)
	if err != nil {
		return Step{}, err
	}
	s := Next(o)
	if s.Action != Wait {
		m.say(string(s.Action) + ": " + s.Reason)
	} else if s.Reason != "" {
		m.say("waits: " + steady(s.Reason))
	}
	return s, m.act(ctx, s, o, revision)
}

// steady leaves out the numbers that change with every look.
func steady(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, s)
}

func (m *Manager) observe(ctx context.Context) (Observed, int64, error) {
	rec, revision, err := m.cfg.Store.Read(ctx)
	if err != nil {
		return Observed{}, 0, err
	}
	ring, _ := m.cfg.Holder.Ring()
	o := Observed{Record: rec, Keys: ring.IDs(), Settle: m.cfg.Settle, Agreed: -1}
	if rec == nil || rec.Rotation != nil { // nobody else has to be asked otherwise
		if o.Members, err = m.ask(ctx); err != nil {
			return o, 0, err
		}
	}
	if rec == nil {
		return o, revision, nil
	}
	if o.SealedBy, err = m.cfg.Store.KeysSealedBy(ctx); err != nil {
		return o, 0, err
	}
	if m.usageOf == rec.Primary {
		o.Usage, o.Counted = m.usage, m.counted
	}
	if rec.Rotation == nil || disagreement(o.Members, rec.Primary) != "" {
		m.agreed = time.Time{}
	} else if m.agreed.IsZero() || m.agreeOn != rec.Primary {
		m.agreed, m.agreeOn = time.Now(), rec.Primary
	}
	if !m.agreed.IsZero() {
		o.Agreed = time.Since(m.agreed)
	}
	return o, revision, nil
}

// ask asks all replicas for their rings. There are at most some dozen.
func (m *Manager) ask(ctx context.Context) ([]Member, error) {
	replicas, err := m.cfg.Replicas.List(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]Member, len(replicas))
	var wg sync.WaitGroup
	for i, r := range replicas {
		wg.Go(func() {
			actx, cancel := context.WithTimeout(ctx, askTimeout)
			defer cancel()
			out[i] = Member{Node: r.Node, Voter: r.Voter}
			report, err := m.cfg.Replicas.Ask(actx, r)
			if err != nil {
				out[i].Silent = err.Error()
				return
			}
			out[i].Keys, out[i].Primary = report.Keys, report.Primary
		})
	}
	wg.Wait()
	return out, ctx.Err()
}

// act carries a step out. Whatever it ends in the middle of, the next look goes on from there.
func (m *Manager) act(ctx context.Context, s Step, o Observed, revision int64) error {
	switch s.Action {
	case Wait:
		if o.Record == nil || o.Record.Rotation == nil || o.Record.Rotation.Waits == s.Reason || s.Reason == "" {
			return nil
		}
		if steady(o.Record.Rotation.Waits) == steady(s.Reason) {
			return nil // not every second of a countdown
		}
		return m.change(ctx, o, revision, func(r *Record) { r.Rotation.Waits = s.Reason })
	case Refuse:
		return m.change(ctx, o, revision, func(r *Record) {
			r.Last = &Outcome{ID: r.Rotation.ID, Refused: s.Reason, Ended: now()}
			r.Rotation = nil
		})
	case Make:
		return m.make(ctx, o, revision)
	case Spread:
		return m.spread(ctx, s.Nodes)
	case Found:
		ring, _ := m.cfg.Holder.Ring()
		_, err := m.cfg.Store.Write(ctx, Record{Primary: ring.Primary()}, 0)
		return err
	case Switch:
		return m.change(ctx, o, revision, func(r *Record) {
			r.Primary, r.Rotation.Phase, r.Rotation.Waits = r.Rotation.To, Resealing, ""
		})
	case SealKeys:
		ring, _ := m.cfg.Holder.Ring()
		ring, err := ring.Use(o.Record.Primary)
		if err != nil {
			return err
		}
		return m.cfg.Store.SealKeys(ctx, ring)
	case Reseal:
		return m.reseal(ctx, o, revision)
	case Count:
		return m.count(ctx, o)
	case Retire:
		return m.change(ctx, o, revision, func(r *Record) {
			r.Rotation.Phase, r.Rotation.Waits = Retiring, ""
			// The old key, and any other that a leader made and did not live to name: all values have been counted, none needs them.
			for _, m := range o.Members {
				for _, k := range m.Keys {
					if k != r.Primary {
						r.retire(Retired{Key: k, Revisions: o.Usage.Revisions})
					}
				}
			}
		})
	case Finish:
		return m.change(ctx, o, revision, func(r *Record) {
			r.Last = &Outcome{ID: r.Rotation.ID, From: r.Rotation.From, To: r.Rotation.To, Ended: now(), Written: r.Rotation.Done}
			r.Rotation = nil
		})
	}
	return fmt.Errorf("keys: unknown action %q", s.Action)
}

func now() time.Time { return time.Now().UTC().Truncate(time.Second) }

// retire remembers the newest keepRetired.
func (r *Record) retire(x Retired) {
	r.Retired = slices.DeleteFunc(r.Retired, func(y Retired) bool { return y.Key == x.Key })
	r.Retired = append(r.Retired, x)
	r.Retired = r.Retired[max(0, len(r.Retired)-keepRetired):]
}

func (m *Manager) change(ctx context.Context, o Observed, revision int64, f func(*Record)) error {
	r := o.Record.clone()
	f(&r)
	_, err := m.cfg.Store.Write(ctx, r, revision)
	return err
}

// make makes a key: first on disk, then in the record.
func (m *Manager) make(ctx context.Context, o Observed, revision int64) error {
	k, err := keyring.NewKey(rand.Reader, time.Now())
	if err != nil {
		return err
	}
	if _, err := m.cfg.Holder.Update(func(r keyring.Ring) (keyring.Ring, error) { return r.Add(k) }); err != nil {
		return err
	}
	if o.Record == nil {
		return nil // the record comes when a majority has the key
	}
	err = m.change(ctx, o, revision, func(r *Record) {
		if abandoned := r.Rotation.To; abandoned != "" && abandoned != r.Primary { // it has sealed nothing
			r.retire(Retired{Key: abandoned})
		}
		r.Rotation.Phase, r.Rotation.From, r.Rotation.To, r.Rotation.Waits = Spreading, r.Primary, k.ID, ""
	})
	if errors.Is(err, ErrConflict) { // the record surely does not name it; after other errors it may
		_, derr := m.cfg.Holder.Update(func(r keyring.Ring) (keyring.Ring, error) { return r.Drop(k.ID) })
		err = errors.Join(err, derr)
	}
	return err
}

// spread gives the ring to the nodes; the next look sees who has taken it.
func (m *Manager) spread(ctx context.Context, nodes []string) error {
	replicas, err := m.cfg.Replicas.List(ctx)
	if err != nil {
		return err
	}
	ring, _ := m.cfg.Holder.Ring()
	var errs []error
	for _, r := range replicas {
		if r.Self || !slices.Contains(nodes, r.Node) {
			continue
		}
		gctx, cancel := context.WithTimeout(ctx, askTimeout)
		if _, err := m.cfg.Replicas.Give(gctx, r, ring); err != nil {
			errs = append(errs, fmt.Errorf("give the key ring to %s: %w", r.Node, err))
		}
		cancel()
	}
	return errors.Join(errs...)
}

// reseal seals stale values anew and keeps the progress in the record.
func (m *Manager) reseal(ctx context.Context, o Observed, revision int64) error {
	if ring, _ := m.cfg.Holder.Ring(); ring.Primary() != o.Record.Primary {
		return fmt.Errorf("this node still seals with the key %s, not with %s", ring.Primary(), o.Record.Primary)
	}
	before, err := m.cfg.Values.Count(ctx, false)
	if err != nil {
		return err
	}
	rec, base := o.Record.clone(), 0
	report := func(int) {}
	if rec.Rotation != nil {
		base = rec.Rotation.Done
		report = func(n int) {
			rec.Rotation.Done, rec.Rotation.Total, rec.Rotation.Waits = base+n, base+max(n, before.Stale), ""
			if next, err := m.cfg.Store.Write(ctx, rec, revision); err == nil {
				revision = next
			} // else somebody has forced it in the meantime, or there is no leader: the next look sees it
		}
	}
	last, done := time.Now(), 0
	report(0)
	u, err := m.cfg.Values.Reseal(ctx, func(n int) {
		done = n
		if time.Since(last) >= progressEvery {
			last = time.Now()
			report(n)
		}
	})
	report(done) // also of what was done before an error
	if err != nil {
		return err
	}
	m.usage, m.usageOf, m.counted = &u, o.Record.Primary, 0
	return nil
}

// count looks at all values.
func (m *Manager) count(ctx context.Context, o Observed) error {
	u, err := m.cfg.Values.Count(ctx, true)
	if err != nil {
		return err
	}
	m.usage, m.usageOf, m.counted = &u, o.Record.Primary, o.Agreed
	return nil
}
