package membership

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"skein.io/skein/gossip/health"
)

// serf's snapshot forgets a member as soon as it is dead from here. A node that was cut off when it rebooted would then know
// nobody to return to, and two halves of a cluster that both restarted would never meet again. So the addresses of all members
// that did not leave are kept here too.
const (
	peersFile    = "peers.json"
	snapshotFile = "serf.snapshot"
	peersVersion = 1
	maxPeers     = 512 // any one of them that lives is enough to find all others
	maxPeersFile = 1 << 20
)

// peers are the addresses of members, dead ones too, that did not leave.
type peers map[string]netip.AddrPort

type peersRecord struct {
	Version int    `json:"version"`
	Peers   []peer `json:"peers"`
}

type peer struct {
	Name string         `json:"name"`
	Addr netip.AddrPort `json:"addr"`
}

// update takes in the members and tells whether anything changed. A member that is no longer listed without having left was
// dead for long: it stays, as this node may have been the one that was away.
func (p peers) update(members []Member) (changed bool) {
	for _, m := range members {
		known, ok := p[m.Name]
		switch {
		case m.Self:
		case m.Verdict == health.Left:
			delete(p, m.Name)
			changed = changed || ok
		case m.Verdict != health.Unknown && known != m.AddrPort() && (ok || len(p) < maxPeers):
			p[m.Name] = m.AddrPort()
			changed = true
		}
	}
	return changed
}

// targets are the addresses that this node should try to join now, at most a few; round, a number that grows with each call,
// makes them take turns. Members that serf lists are tried by serf itself, dead ones too; here it is about those that it has
// forgotten, and, while nobody else is there, about everyone.
func (p peers) targets(v *view, seeds []netip.AddrPort, round int) []netip.AddrPort {
	company := v.company()
	var candidates []netip.AddrPort
	for name, addr := range p {
		if m, listed := v.members[name]; !listed || !company && m.Verdict != health.Left {
			candidates = append(candidates, addr)
		}
	}
	limit := 1
	if !company {
		limit = 3
		candidates = append(candidates, seeds...)
	}
	slices.SortFunc(candidates, func(a, b netip.AddrPort) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Port(), b.Port()))
	})
	candidates = slices.Compact(candidates)
	if len(candidates) <= limit {
		return candidates
	}
	out := make([]netip.AddrPort, limit)
	for i := range out {
		out[i] = candidates[(round*limit+i)%len(candidates)]
	}
	return out
}

// loadPeers reads what savePeers wrote. A file that cannot be read is an error, but none that should keep a node from starting.
func loadPeers(dir string) (peers, error) {
	p := peers{}
	path := filepath.Join(dir, peersFile)
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err == nil && info.Size() > maxPeersFile {
		err = fmt.Errorf("%s: %d bytes are more than it can have", path, info.Size())
	}
	if err != nil {
		return p, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return p, err
	}
	record, err := decodePeers(data)
	if err != nil {
		return p, fmt.Errorf("%s: %w", path, err)
	}
	for _, e := range record.Peers {
		p[e.Name] = e.Addr
	}
	return p, nil
}

func decodePeers(data []byte) (peersRecord, error) {
	var record peersRecord
	if err := json.Unmarshal(data, &record); err != nil {
		return peersRecord{}, err
	}
	if record.Version < 1 || record.Version > peersVersion {
		return peersRecord{}, fmt.Errorf("version %d is not one this skein knows (1 to %d)", record.Version, peersVersion)
	}
	if len(record.Peers) > maxPeers {
		record.Peers = record.Peers[:maxPeers]
	}
	for _, e := range record.Peers {
		if e.Name == "" || !e.Addr.IsValid() {
			return peersRecord{}, fmt.Errorf("peer %q has no address", e.Name)
		}
	}
	return record, nil
}

// savePeers writes by rename. It does not sync: after a power failure an older list, or none, costs nothing but time.
func savePeers(dir string, p peers) error {
	record := peersRecord{Version: peersVersion}
	for name, addr := range p {
		record.Peers = append(record.Peers, peer{name, addr})
	}
	slices.SortFunc(record.Peers, func(a, b peer) int { return cmp.Compare(a.Name, b.Name) })
	data, err := json.Marshal(record)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, peersFile)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
