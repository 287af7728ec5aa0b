package membership

import (
	"context"
	"net"
	"time"

	"skein.io/skein/gossip/health"
)

const maxMissed = 64 // members that wait to be probed again; more do not make the picture clearer

// probeAgain follows up on members that did not answer one of memberlist's direct probes, until they answer or are given up.
// One probe at a time, so a large outage costs no burst of packets.
func (m *Membership) probeAgain(ctx context.Context) {
	type doubt struct {
		next  time.Time
		fails int
	}
	doubts := map[string]doubt{}
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case name := <-m.missed:
			if _, known := doubts[name]; !known && len(doubts) < maxMissed {
				doubts[name] = doubt{}
			}
		case <-timer.C:
		}
		for name, d := range doubts {
			if time.Now().Before(d.next) || ctx.Err() != nil {
				continue
			}
			member, ok := m.Member(name)
			if !ok || member.Verdict != health.Alive && member.Verdict != health.Suspect {
				delete(doubts, name)
				continue
			}
			_, err := m.serf.Memberlist().Ping(name, net.UDPAddrFromAddrPort(member.AddrPort()))
			if err == nil {
				delete(doubts, name)
			} else {
				d.fails++
				d.next = time.Now().Add(min(time.Duration(d.fails)*m.timing.probeInterval, 10*m.timing.probeInterval))
				doubts[name] = d
			}
			m.note(name, err != nil)
		}
		wait := time.Hour
		for _, d := range doubts {
			wait = min(wait, max(time.Until(d.next), 0))
		}
		timer.Reset(wait)
	}
}

// missedProbe is asked by memberlist whether to try TCP after a direct probe by UDP got no answer; we always do, and take note.
func (m *Membership) missedProbe(name string) (disableTCP bool) {
	select {
	case m.missed <- name:
	default:
	}
	return false
}

// note takes in whether a member answered this node.
func (m *Membership) note(name string, suspected bool) {
	m.mu.Lock()
	changes := m.view.suspect(time.Now(), name, suspected)
	m.mu.Unlock()
	if len(changes) > 0 {
		m.announce(changes)
	}
}
