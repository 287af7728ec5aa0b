package membership

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/serf/serf"

	"skein.io/skein/gossip/health"
)

const (
	eventQueue = 256             // serf drops events that do not fit; they are only hints to look again
	lookAgain  = 2 * time.Second // for the case that one was dropped
	keepPeers  = time.Second     // between two writes of the list of peers
)

// ErrStopped says that the Membership has ended.
var ErrStopped = errors.New("gossip has stopped")

// Membership is this node's part in gossip. [Start] makes one.
type Membership struct {
	cfg     Config
	timing  timing
	addr    netip.AddrPort
	log     *slog.Logger
	serf    *serf.Serf
	started time.Time

	events    chan serf.Event
	missed    chan string   // names of members that missed a probe
	conflicts chan Conflict // to be told
	fatal     chan error    // why this node cannot stay; first one counts
	dirty     chan struct{} // the list of peers has to be written

	cancel  context.CancelFunc
	done    chan struct{}
	leaving sync.WaitGroup // a good-bye that is under way; memberlist panics if it is shut down meanwhile

	tagsMu sync.Mutex // held while serf's tags are changed, which serf itself does not guard

	mu          sync.Mutex // guards all below; nothing is called under it
	view        *view
	tags        map[string]string // this node's own; replaced, never changed
	peers       peers
	left        bool // this node has begun to leave: the list of peers is not to come back
	closing     bool // no new good-bye may begin
	refusal     error
	subscribers map[chan struct{}]struct{}
	sightings   map[Conflict]sighting
	err         error // why it ended
}

// Start makes this node a member. It returns once gossip listens; members that are known from before, and the seeds, are joined
// in the background, again and again while there is nobody else. ctx ends the membership as [Membership.Shutdown] does.
func Start(ctx context.Context, cfg Config) (*Membership, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	m := &Membership{
		cfg: cfg, timing: cfg.timing(), addr: netip.AddrPortFrom(cfg.Addr, cfg.Port), log: cfg.Logger, started: time.Now(),
		events: make(chan serf.Event, eventQueue), missed: make(chan string, maxMissed), conflicts: make(chan Conflict, 8),
		fatal: make(chan error, 1), dirty: make(chan struct{}, 1), done: make(chan struct{}),
		view: newView(cfg.Name), tags: maps.Clone(cfg.Tags), peers: peers{}, subscribers: map[chan struct{}]struct{}{},
		sightings: map[Conflict]sighting{},
	}
	if cfg.Dir != "" {
		err := os.Mkdir(cfg.Dir, 0o700)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("gossip: %w", err)
		}
		if m.peers, err = loadPeers(cfg.Dir); err != nil {
			m.log.Warn("the list of known members cannot be read; seeds and the others have to find this node", "err", err)
		}
	}
	ctx, m.cancel = context.WithCancel(ctx)
	if err := m.createSerf(ctx); err != nil {
		m.cancel()
		return nil, err
	}
	m.look()
	go m.run(ctx)
	return m, nil
}

func (m *Membership) createSerf(ctx context.Context) error {
	logger := log.New(libraryLog{m.log}, "", 0)
	trans, err := newTransport(ctx, &m.cfg, logger)
	if err != nil {
		return err
	}
	c := m.timing.serf()
	c.NodeName, c.Tags = m.cfg.Name, m.cfg.wireTags(m.tags)
	c.EventCh = m.events
	c.Logger = logger
	if m.cfg.Dir != "" {
		c.SnapshotPath = filepath.Join(m.cfg.Dir, snapshotFile)
	}
	ml := c.MemberlistConfig
	ml.Logger, ml.Transport, ml.SecretKey = logger, trans, slices.Clone(m.cfg.Key)
	ml.BindAddr, ml.BindPort = m.cfg.Addr.String(), int(m.cfg.Port)
	ml.AdvertiseAddr, ml.AdvertisePort = m.cfg.Addr.String(), int(m.cfg.Port)
	// serf would hide the state of the nodes in a merge from a delegate of its own kind, so ours is memberlist's.
	ml.Merge, ml.Alive = gate{m}, gate{m}
	ml.DisableTcpPingsForNode = m.missedProbe
	if m.serf, err = serf.Create(c); err != nil {
		return fmt.Errorf("gossip: %w", errors.Join(err, trans.Shutdown()))
	}
	return nil
}

// run owns every goroutine of this package and ends when all have.
func (m *Membership) run(ctx context.Context) {
	var wg sync.WaitGroup
	for _, f := range []func(context.Context){m.follow, m.tellConflicts, m.probeAgain, m.rejoin, m.keepPeers} {
		wg.Go(func() { f(ctx) })
	}
	var why error
	select {
	case <-ctx.Done():
		why = ErrStopped
	case why = <-m.fatal:
	case <-m.serf.ShutdownCh():
		// Nobody here asked for it: the vote on this node's name was lost.
		why = fmt.Errorf("%w: the members voted for another node called %q; give this one another name (leave, then join with --name)",
			ErrNameTaken, m.cfg.Name)
	}
	m.cancel()
	m.mu.Lock()
	m.closing = true
	m.mu.Unlock()
	m.leaving.Wait()
	if err := m.serf.Shutdown(); err != nil {
		m.log.Warn("gossip did not shut down cleanly", "err", err)
	}
	wg.Wait()
	m.mu.Lock()
	m.err = why
	m.mu.Unlock()
	if !errors.Is(why, ErrStopped) {
		m.log.Error("gossip ended", "err", why)
	}
	close(m.done)
}

// follow keeps the view up to date with serf. It goes on until serf has ended, which a full queue of events would prevent.
func (m *Membership) follow(context.Context) {
	ticker := time.NewTicker(lookAgain)
	defer ticker.Stop()
	for {
		select {
		case <-m.serf.ShutdownCh():
			return
		case <-m.events:
			// One look serves all events that have come meanwhile.
			for len(m.events) > 0 {
				<-m.events
			}
		case <-ticker.C:
		}
		m.look()
	}
}

// look takes in serf's list of members.
func (m *Membership) look() {
	list := m.serf.Members()
	seen := make([]observed, 0, len(list))
	for _, s := range list {
		addr, _ := netip.AddrFromSlice(s.Addr)
		seen = append(seen, observed{s.Name, addr.Unmap(), s.Port, s.Tags, s.Status})
	}
	m.mu.Lock()
	changes, changed := m.view.observe(time.Now(), seen)
	dirty := changed && !m.left && m.peers.update(m.view.sorted())
	m.mu.Unlock()
	if dirty {
		poke(m.dirty)
	}
	if changed {
		m.announce(changes)
	}
}

// announce logs changes and tells the subscribers that there are some.
func (m *Membership) announce(changes []change) {
	for _, c := range changes {
		switch {
		case c.member.Self:
		case c.gone:
			m.log.Info("member forgotten", "node", c.member.Name, "was", c.was.String())
		default:
			m.log.Info("member is "+c.member.Verdict.String(), "node", c.member.Name, "addr", c.member.AddrPort().String(),
				"was", c.was.String(), "for", c.lasted.Round(time.Millisecond))
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for ch := range m.subscribers {
		poke(ch)
	}
}

// poke leaves a mark that is there until it is read.
func poke(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

func (m *Membership) tellConflicts(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case c := <-m.conflicts:
			m.log.Warn("name conflict", "node", c.Name, "known", c.Known.String(), "other", c.Other.String(), "self", c.Self)
			if m.cfg.OnConflict != nil {
				m.cfg.OnConflict(c)
			}
		}
	}
}

// rejoin finds the way back to members that serf does not know (any more), and to the seeds.
func (m *Membership) rejoin(ctx context.Context) {
	ticker := time.NewTicker(m.timing.reconnect)
	defer ticker.Stop()
	for round := 0; ; round++ {
		m.mu.Lock()
		targets := m.peers.targets(m.view, m.cfg.Seeds, round)
		if m.left {
			targets = nil
		}
		m.mu.Unlock()
		for _, addr := range targets {
			if addr == m.addr || ctx.Err() != nil {
				continue
			}
			if _, err := m.join([]string{addr.String()}); err != nil {
				m.log.Debug("member not reached", "addr", addr.String(), "err", err)
				m.yield(err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// yield ends this node's membership if it was kept out because its name is another's. While it has company it is the other one
// that came later.
func (m *Membership) yield(err error) {
	m.mu.Lock()
	company := m.view.company()
	m.mu.Unlock()
	if company || !errors.Is(err, ErrNameTaken) {
		return
	}
	select {
	case m.fatal <- err:
	default:
	}
}

// keepPeers writes the list of peers after changes.
func (m *Membership) keepPeers(ctx context.Context) {
	if m.cfg.Dir == "" {
		return
	}
	for done := false; !done; {
		select {
		case <-ctx.Done():
			done = true // what changed last is written too
		case <-m.dirty:
		}
		m.mu.Lock()
		list := maps.Clone(m.peers)
		m.mu.Unlock()
		if err := savePeers(m.cfg.Dir, list); err != nil {
			m.log.Warn("the list of known members was not written; after a restart this node may have to be told whom to join", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(keepPeers):
		}
	}
}

// Join contacts the gossip addresses (host:port, or host for the default port) and returns how many answered; the error, unless
// one did, says why not: it wraps [ErrNameTaken], or identity.ErrIncompatible, if that is the reason.
func (m *Membership) Join(addrs []string) (int, error) {
	n, err := m.join(addrs)
	if err != nil {
		return n, fmt.Errorf("gossip: joining %s: %w", strings.Join(addrs, ", "), err)
	}
	return n, nil
}

func (m *Membership) join(addrs []string) (int, error) {
	m.mu.Lock()
	m.refusal = nil
	m.mu.Unlock()
	n, err := m.serf.Join(addrs, true)
	if err == nil {
		m.look() // what was learned is to be seen by whoever joined
		return n, nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refusal != nil {
		return n, m.refusal // memberlist made text of it
	}
	if text := err.Error(); strings.Contains(text, "EOF") || strings.Contains(text, "decrypt") || strings.Contains(text, "connection reset") {
		return n, fmt.Errorf("%w (the other side hung up: it may belong to another cluster, with another gossip key)", err)
	}
	return n, err
}

func (m *Membership) refused(err error) {
	m.mu.Lock()
	m.refusal = err
	m.mu.Unlock()
	m.log.Warn("gossip with a node refused", "err", err)
}

// Members are all members that are known, sorted by name: this node, living, suspect and dead ones, and for a day those that
// left. The slice is the caller's, the tags in it are not.
func (m *Membership) Members() []Member {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.view.sorted()
}

// Member is the member with the name.
func (m *Membership) Member(name string) (Member, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	member, ok := m.view.members[name]
	return member, ok
}

// Verdicts are the verdicts on all members by name, for health.PanicThreshold.
func (m *Membership) Verdicts() map[string]health.Verdict {
	m.mu.Lock()
	defer m.mu.Unlock()
	return verdicts(m.view)
}

func verdicts(v *view) map[string]health.Verdict {
	out := make(map[string]health.Verdict, len(v.members))
	for name, member := range v.members {
		out[name] = member.Verdict
	}
	return out
}

// Subscribe returns a channel that is readable whenever the members may differ from when it was last read, and once at first;
// the function ends it. However many changes there were, one read takes them all: read it, then Members.
func (m *Membership) Subscribe() (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	ch <- struct{}{}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.subscribers[ch] = struct{}{}
	return ch, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.subscribers, ch)
	}
}

// SetTags replaces this node's tags (the protocol levels are added to them) and tells the others. It returns when the news has
// left this node, or after the profile's broadcast time-out, in which case it spreads later. The error says that they do not
// fit into the 512 bytes that there are, or that gossip has stopped.
func (m *Membership) SetTags(tags map[string]string) error {
	wire := m.cfg.wireTags(tags)
	if err := checkTags(wire); err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	m.tagsMu.Lock()
	defer m.tagsMu.Unlock()
	if m.stopped() {
		return ErrStopped
	}
	m.mu.Lock()
	same := maps.Equal(m.tags, tags)
	m.tags = maps.Clone(tags)
	m.mu.Unlock()
	if same {
		return nil
	}
	err := m.serf.SetTags(wire)
	m.look()
	if err != nil {
		if m.stopped() {
			return ErrStopped
		}
		m.log.Info("tags changed, nobody confirmed to have heard of it yet", "err", err)
	}
	return nil
}

// Tags are this node's own tags as they were set last. The map is shared and must not be changed.
func (m *Membership) Tags() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.tags
}

// RTT estimates the round-trip time to a member from network coordinates (Vivaldi). It is unknown until this node has probed the
// member, and rough for the first minute.
func (m *Membership) RTT(name string) (time.Duration, bool) {
	if name == m.cfg.Name {
		return 0, true
	}
	own, err := m.serf.GetCoordinate()
	other, ok := m.serf.GetCachedCoordinate(name)
	if err != nil || !ok || !own.IsCompatibleWith(other) {
		return 0, false
	}
	return own.DistanceTo(other), true
}

// Forget makes the cluster forget a member that will not come back, and stop trying to reach it. A member that lives is not
// forgotten by this: it objects.
func (m *Membership) Forget(name string) error {
	if name == m.cfg.Name {
		return errors.New("gossip: this node cannot forget itself; it can leave")
	}
	m.mu.Lock()
	delete(m.peers, name)
	m.mu.Unlock()
	poke(m.dirty)
	if err := m.serf.RemoveFailedNodePrune(name); err != nil {
		return fmt.Errorf("gossip: forgetting node %q: %w", name, err)
	}
	return nil
}

// Leave says good-bye, so that nobody waits for this node or holds it for dead, and forgets the others: a later start joins
// nobody by itself. It takes a second or two; when ctx ends, only the wait for it does. Shutdown is still to be called, and
// waits for the good-bye (at most twice the profile's broadcast time-out).
func (m *Membership) Leave(ctx context.Context) error {
	m.mu.Lock()
	if m.closing {
		m.mu.Unlock()
		return ErrStopped
	}
	m.left, m.peers = true, peers{}
	m.leaving.Add(1)
	m.mu.Unlock()
	poke(m.dirty)
	result := make(chan error, 1)
	go func() {
		defer m.leaving.Done()
		result <- m.serf.Leave()
	}()
	select {
	case err := <-result:
		m.look()
		if err != nil {
			return fmt.Errorf("gossip: leaving: %w", err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("gossip: leaving: %w", ctx.Err())
	case <-m.done:
		return ErrStopped
	}
}

// Shutdown ends gossip without a good-bye, as a crash would, so that the others expect this node back. It returns when all has
// ended, and may be called again.
func (m *Membership) Shutdown() error {
	m.cancel()
	<-m.done
	return nil
}

// Done is closed when gossip has ended, for whatever reason; Err tells which.
func (m *Membership) Done() <-chan struct{} { return m.done }

// Err is why gossip ended: [ErrStopped] if somebody wanted it to, [ErrNameTaken] if this node had to yield, nil if it runs.
func (m *Membership) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

func (m *Membership) stopped() bool {
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}
