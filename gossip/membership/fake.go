package membership

import (
	"context"
	"maps"
	"sync"
	"time"

	"skein.io/skein/gossip/health"
)

// Fake is a membership in memory, for tests of what consumes one: it has [Membership]'s methods and others with which a test
// says what is seen. It starts with the node itself, alive. Since is set from the clock that [NewFake] got. All methods may be
// called from any goroutine.
type Fake struct {
	now func() time.Time

	mu          sync.Mutex // guards all below
	self        string
	view        *view
	rtt         map[string]time.Duration
	joined      []string
	subscribers map[chan struct{}]struct{}
	done        chan struct{}
	stopped     bool
	err         error
}

// same is the part that Membership and Fake share; consumers declare the part of it that they need.
type same interface {
	Members() []Member
	Member(name string) (Member, bool)
	Verdicts() map[string]health.Verdict
	Subscribe() (<-chan struct{}, func())
	SetTags(tags map[string]string) error
	Tags() map[string]string
	RTT(name string) (time.Duration, bool)
	Join(addrs []string) (int, error)
	Forget(name string) error
	Leave(ctx context.Context) error
	Shutdown() error
	Done() <-chan struct{}
	Err() error
}

var (
	_ same = (*Membership)(nil)
	_ same = (*Fake)(nil)
)

// NewFake makes a Fake for the node self. now is its clock; nil means time.Now.
func NewFake(self Member, now func() time.Time) *Fake {
	if now == nil {
		now = time.Now
	}
	f := &Fake{now: now, self: self.Name, view: newView(self.Name), rtt: map[string]time.Duration{},
		subscribers: map[chan struct{}]struct{}{}, done: make(chan struct{})}
	self.Verdict = health.Alive
	f.Set(self)
	return f
}

// Set adds a member or replaces it. Since and Self are set by the Fake; an Unknown verdict becomes Alive.
func (f *Fake) Set(m Member) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old, known := f.view.members[m.Name]
	if m.Verdict == health.Unknown {
		m.Verdict = health.Alive
	}
	m.Self, m.Tags, m.Since = m.Name == f.self, maps.Clone(m.Tags), f.now()
	if known && old.Verdict == m.Verdict {
		m.Since = old.Since
	}
	f.view.members[m.Name] = m
	f.changed()
}

// SetVerdict changes what is thought of a member, which must exist.
func (f *Fake) SetVerdict(name string, v health.Verdict) {
	m, ok := f.Member(name)
	if !ok {
		panic("membership.Fake: no member " + name)
	}
	m.Verdict = v
	f.Set(m)
}

// SetRTT says how far away a member is.
func (f *Fake) SetRTT(name string, rtt time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rtt[name] = rtt
}

// Joined are all addresses that Join was given.
func (f *Fake) Joined() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.joined...)
}

// End ends the membership with err, as a lost name would.
func (f *Fake) End(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.stopped {
		f.stopped, f.err = true, err
		close(f.done)
	}
}

// changed tells the subscribers; f.mu is held.
func (f *Fake) changed() {
	for ch := range f.subscribers {
		poke(ch)
	}
}

// Members is [Membership.Members].
func (f *Fake) Members() []Member {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.view.sorted()
}

// Member is [Membership.Member].
func (f *Fake) Member(name string) (Member, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m, ok := f.view.members[name]
	return m, ok
}

// Verdicts is [Membership.Verdicts].
func (f *Fake) Verdicts() map[string]health.Verdict {
	f.mu.Lock()
	defer f.mu.Unlock()
	return verdicts(f.view)
}

// Subscribe is [Membership.Subscribe].
func (f *Fake) Subscribe() (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	ch <- struct{}{}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.subscribers[ch] = struct{}{}
	return ch, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.subscribers, ch)
	}
}

// SetTags is [Membership.SetTags].
func (f *Fake) SetTags(tags map[string]string) error {
	if err := checkTags(tags); err != nil {
		return err
	}
	m, _ := f.Member(f.self)
	m.Tags = tags
	f.Set(m)
	return nil
}

// Tags is [Membership.Tags].
func (f *Fake) Tags() map[string]string {
	m, _ := f.Member(f.self)
	return m.Tags
}

// RTT is [Membership.RTT], as SetRTT said.
func (f *Fake) RTT(name string) (time.Duration, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rtt, ok := f.rtt[name]
	return rtt, ok || name == f.self
}

// Join notes the addresses and succeeds.
func (f *Fake) Join(addrs []string) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.joined = append(f.joined, addrs...)
	return len(addrs), nil
}

// Forget removes a member.
func (f *Fake) Forget(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.view.members, name)
	f.changed()
	return nil
}

// Leave makes this node one that left.
func (f *Fake) Leave(context.Context) error {
	f.SetVerdict(f.self, health.Left)
	return nil
}

// Shutdown is [Membership.Shutdown].
func (f *Fake) Shutdown() error {
	f.End(ErrStopped)
	return nil
}

// Done is [Membership.Done].
func (f *Fake) Done() <-chan struct{} { return f.done }

// Err is [Membership.Err].
func (f *Fake) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}
