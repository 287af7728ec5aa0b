package main

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// peersPoll is how often the file is looked at: news spread as fast as in gossip.
const peersPoll = 100 * time.Millisecond

type peer struct{ name, id, addr, etcd string }

// peers stands for gossip.
type peers struct {
	path string // "" if the list is fixed
	now  atomic.Pointer[[]peer]
	stop chan struct{}
	wg   sync.WaitGroup
}

// openPeers reads a list, or a file with one: what contains a "=" is a list.
func openPeers(s string) (*peers, error) {
	p := &peers{stop: make(chan struct{})}
	if !strings.Contains(s, "=") {
		p.path = s
		b, err := os.ReadFile(s)
		if err != nil {
			return nil, err
		}
		s = string(b)
	}
	list, err := parsePeers(s)
	if err != nil {
		return nil, err
	}
	p.now.Store(&list)
	if p.path != "" {
		p.wg.Go(p.poll)
	}
	return p, nil
}

func parsePeers(s string) (out []peer, err error) {
	for _, f := range strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == '\n' }) {
		v := strings.Split(strings.TrimSpace(f), "=")
		if len(v) != 3 && len(v) != 4 {
			return nil, fmt.Errorf("peer %q is not NAME=NODEHOSTID=ADDRESS[=ETCD]", f)
		}
		x := peer{name: v[0], id: v[1], addr: v[2]}
		if len(v) == 4 {
			x.etcd = v[3]
		}
		out = append(out, x)
	}
	return out, nil
}

// poll keeps the last good list: a writer need not be atomic.
func (p *peers) poll() {
	t := time.NewTicker(peersPoll)
	defer t.Stop()
	var seen string
	for {
		select {
		case <-p.stop:
			return
		case <-t.C:
		}
		b, err := os.ReadFile(p.path)
		if err != nil || string(b) == seen {
			continue
		}
		seen = string(b)
		if list, err := parsePeers(seen); err == nil && len(list) > 0 {
			p.now.Store(&list)
		}
	}
}

func (p *peers) close() {
	close(p.stop)
	p.wg.Wait()
}

func (p *peers) find(match func(peer) bool) (peer, bool) {
	for _, x := range *p.now.Load() {
		if match(x) {
			return x, true
		}
	}
	return peer{}, false
}

func (p *peers) id(name string) (string, bool) {
	x, ok := p.find(func(x peer) bool { return x.name == name })
	return x.id, ok
}

// resolve is false for a peer without an address, which is how one is shown dead.
func (p *peers) resolve(id string) (string, bool) {
	x, ok := p.find(func(x peer) bool { return x.id == id })
	return x.addr, ok && x.addr != ""
}

func (p *peers) name(id string) string {
	if x, ok := p.find(func(x peer) bool { return x.id == id }); ok {
		return x.name
	}
	return id
}

func (p *peers) ids() (out []string) {
	for _, x := range *p.now.Load() {
		if x.addr != "" {
			out = append(out, x.id)
		}
	}
	return out
}
