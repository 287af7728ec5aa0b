package podnet

import (
	"net/netip"
	"slices"
	"sync"
)

// Fake stands in for a Net in tests: it plans like one, keeps the peers and makes nothing. Local are the networks that its
// node is on. It may be used from several goroutines; set the fields before.
type Fake struct {
	Config Config
	Local  []netip.Prefix
	Err    error // returned by every call if not nil

	mu    sync.Mutex // guards peers
	peers []Peer
}

// Setup is Net.Setup.
func (f *Fake) Setup() error { return f.Err }

// Apply is Net.Apply.
func (f *Fake) Apply(peers []Peer) (State, error) {
	if f.Err != nil {
		return State{}, f.Err
	}
	f.mu.Lock()
	f.peers = slices.Clone(peers)
	f.mu.Unlock()
	ways, faults := plan(f.Config, f.Local, peers)
	st := stateOf(f.Config, ways)
	st.Faults = faults
	return st, nil
}

// Peers is what was applied last.
func (f *Fake) Peers() []Peer {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.peers)
}
