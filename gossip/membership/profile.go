package membership

import (
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/serf"
)

// Profile names a set of timings.
type Profile string

const (
	// LAN is for nodes with a few milliseconds between them: a dead node is given up after 2 to 3 seconds in clusters of up
	// to about ten nodes, one second more for every tenfold.
	LAN Profile = "lan"
	// Edge is for slow, lossy or far links (round trips up to 0.8 s): 11 to 16 seconds, and a tenth of the traffic.
	Edge Profile = "edge"
)

// timing is a profile's numbers. How long a death takes to be declared, with memberlist's algorithm (SWIM with Lifeguard):
// the wait for the next probe of the node by anyone, then one probe interval until that probe has failed, then suspicionMult
// probe intervals (times log10 of the number of nodes, from 10 nodes on).
type timing struct {
	probeInterval time.Duration // between two probes of this node, each of another member
	// probeTimeout for the direct answer. What is left of the interval is for indirect probes; those need another probe
	// timeout to come back with "no answer" (a nack), without which memberlist takes the fault for its own and slows down.
	probeTimeout time.Duration
	// awareness bounds how many times slower a node may get at judging others while its own probes fail for reasons that may
	// be its own (Lifeguard). With memberlist's 8, the survivor of two nodes, who has nobody to ask, took over 5 s to see a
	// death that came soon after another one.
	awareness      int
	suspicionMult  int
	suspicionMax   int // times the suspicion time, when nobody confirms
	gossipInterval time.Duration
	// retransmit, times log10 of the number of nodes rounded up: how often each node passes on a piece of news, each time to
	// a random other one. memberlist's 4 lets one of 8 nodes miss a piece in 9 % of all cases, until the next full exchange.
	retransmit       int
	gossipToTheDead  time.Duration // that long a dead node is still told that it is thought dead, so that it can object
	pushPullInterval time.Duration
	streamTimeout    time.Duration // for a TCP dial, read or write
	reconnect        time.Duration // between two attempts to reach members that are dead
	broadcastTimeout time.Duration
	leaveDelay       time.Duration // that long a leaving node still answers while the news spreads
	// settle is how long after a start the others may still believe in this node's former address.
	settle   time.Duration
	compress bool
	packet   int // bytes of a UDP payload
}

var profiles = map[Profile]timing{
	LAN: {
		probeInterval: 500 * time.Millisecond, probeTimeout: 200 * time.Millisecond, awareness: 3, suspicionMult: 3, suspicionMax: 3,
		gossipInterval: 100 * time.Millisecond, retransmit: 10, gossipToTheDead: 30 * time.Second, pushPullInterval: 15 * time.Second,
		streamTimeout: 3 * time.Second, reconnect: 2 * time.Second, broadcastTimeout: 2 * time.Second, leaveDelay: time.Second,
		settle: 15 * time.Second, packet: 1400,
	},
	Edge: {
		probeInterval: 2 * time.Second, probeTimeout: 900 * time.Millisecond, awareness: 4, suspicionMult: 5, suspicionMax: 3,
		gossipInterval: 500 * time.Millisecond, retransmit: 8, gossipToTheDead: 2 * time.Minute, pushPullInterval: time.Minute,
		streamTimeout: 15 * time.Second, reconnect: 10 * time.Second, broadcastTimeout: 10 * time.Second, leaveDelay: 3 * time.Second,
		settle: 90 * time.Second, compress: true, packet: 1200, // fits the tunnels that such links often are
	},
}

// forgetAfter is how long serf lists a member that is dead or has left. A dead one is tried all that time, and our own list of
// peers outlasts it.
const (
	forgetDeadAfter = 7 * 24 * time.Hour
	forgetLeftAfter = 24 * time.Hour
)

func (t timing) memberlist() *memberlist.Config {
	c := memberlist.DefaultLANConfig()
	c.ProbeInterval, c.ProbeTimeout, c.AwarenessMaxMultiplier = t.probeInterval, t.probeTimeout, t.awareness
	c.SuspicionMult, c.SuspicionMaxTimeoutMult = t.suspicionMult, t.suspicionMax
	c.GossipInterval, c.GossipToTheDeadTime = t.gossipInterval, t.gossipToTheDead
	c.PushPullInterval, c.TCPTimeout = t.pushPullInterval, t.streamTimeout
	c.RetransmitMult = t.retransmit
	c.EnableCompression, c.UDPBufferSize = t.compress, t.packet
	// A node that died may come back at another address at once. Who may carry a name is settled when it joins.
	c.DeadNodeReclaimTime = time.Millisecond
	return c
}

func (t timing) serf() *serf.Config {
	c := serf.DefaultConfig()
	c.MemberlistConfig = t.memberlist()
	c.BroadcastTimeout, c.LeavePropagateDelay = t.broadcastTimeout, t.leaveDelay
	c.ReconnectInterval, c.ReconnectTimeout, c.TombstoneTimeout = t.reconnect, forgetDeadAfter, forgetLeftAfter
	c.EnableNameConflictResolution = true
	c.RejoinAfterLeave = false
	c.UserEventSizeLimit, c.EventBuffer, c.QueryBuffer = 64, 8, 64 // user events are not used; queries only to settle names
	return c
}
