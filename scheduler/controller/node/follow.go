package node

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"skein.io/skein/scheduler/controller"
)

// follow keeps the judgements and the brake up to date and wakes the nodes
// that they concern. The clock is looked at only while there are nodes that
// heartbeats decide about: gossip tells by itself.
func (c *Controller) follow(ctx context.Context) {
	verdicts, stop := c.health.Subscribe()
	defer stop()
	c.judgeAll()
	timer := c.clock.NewTimer(c.set.CheckEvery)
	defer timer.Stop()
	armed := true
	for {
		if c.byHand() && !armed {
			timer.Reset(c.set.CheckEvery)
			armed = true
		}
		select {
		case <-ctx.Done():
			return
		case <-verdicts:
			c.judgeAll()
		case <-c.wake:
			c.judgeTouched()
		case <-timer.C():
			armed = false
			c.judgeAll()
		}
	}
}

// byHand reports whether there are nodes that only their heartbeats tell about.
func (c *Controller) byHand() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.beats) > 0
}

// judgeAll judges every node by what the failure detector says now.
func (c *Controller) judgeAll() {
	nodes, err := c.lister.List(labels.Everything())
	if err != nil {
		panic("node: the view cannot be listed: " + err.Error()) // it reads memory
	}
	verdicts := c.health.Verdicts()
	now := c.clock.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.verdicts = verdicts
	wake := c.dirty
	c.dirty = map[string]bool{}
	there := make(map[string]bool, len(nodes))
	for _, n := range nodes {
		there[n.Name] = true
		if c.judgeOne(n, now) {
			wake[n.Name] = true
		}
	}
	for name := range c.judged {
		if !there[name] {
			wake[name] = true
			c.drop(name)
		}
	}
	gone := map[string]bool{}
	for name, v := range verdicts {
		if !there[name] && v.State == controller.Left {
			gone[name] = true
			wake[name] = wake[name] || !c.gone[name]
		}
	}
	c.gone = gone
	c.settle(wake)
}

// judgeTouched judges the nodes whose objects changed, by the verdicts of the
// last look at all: when those change, all are looked at. So a change of one
// of many nodes costs what one node costs.
func (c *Controller) judgeTouched() {
	now := c.clock.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	wake := c.dirty
	c.dirty = map[string]bool{}
	for name := range wake {
		n, err := c.lister.Get(name)
		if err != nil { // it is gone: the view has no other errors
			c.drop(name)
			if c.verdicts[name].State == controller.Left {
				c.gone[name] = true
			}
			continue
		}
		delete(c.gone, name)
		c.judgeOne(n, now)
	}
	c.settle(wake)
}

// judgeOne renews the judgement on a node and reports whether it changed.
// c.mu is held.
func (c *Controller) judgeOne(n *corev1.Node, now time.Time) bool {
	verdict := c.verdicts[n.Name]
	var last time.Time
	if verdict.State == controller.Unknown {
		last = c.heartbeat(n, now)
	} else {
		delete(c.beats, n.Name)
	}
	j := judge(n, verdict, last, c.set, now)
	old, known := c.judged[n.Name]
	if known && old.fate == j.fate {
		j.since = old.since
	}
	if known && old == j {
		return false
	}
	c.count(old, -1)
	c.count(j, 1)
	c.judged[n.Name] = j
	return true
}

// count adds a node to the census of its zone, or takes it out. c.mu is held.
func (c *Controller) count(j judgement, by int) {
	if !j.counts {
		return
	}
	zone := c.census[j.zone]
	if j.ready {
		zone.Ready += by
	} else {
		zone.NotReady += by
	}
	c.census[j.zone] = zone
	if zone == (ZoneCount{}) {
		delete(c.census, j.zone)
	}
}

// drop forgets a node whose object is gone. c.mu is held.
func (c *Controller) drop(name string) {
	c.count(c.judged[name], -1)
	delete(c.judged, name)
	c.cidrs.release(name)
	delete(c.beats, name)
	delete(c.tainted, name)
	delete(c.said, name)
	c.brake.forget(name)
}

// settle sets the brake by the census and queues the nodes that are to be
// worked on. c.mu is held.
func (c *Controller) settle(wake map[string]bool) {
	changed := c.brake.set(c.census, c.clock.Now())
	for _, zone := range changed {
		count, pace := c.census[zone], c.brake.pace(zone)
		c.log.Warn("pace of evictions changed", "zone", zoneName(zone), "pace", pace.String(),
			"ready", count.Ready, "notReady", count.NotReady)
		held := false // nodes that are new, and not ready yet, have no pods that the brake could keep
		for name, j := range c.judged {
			if j.zone == zone {
				wake[name] = true
				held = held || j.evicts() && pace != (Pace{}) && c.holdsPods(name)
			}
		}
		if held {
			c.set.Board.braked(zone)
		}
	}
	for name, yes := range wake {
		if yes {
			c.queue.Add(name)
		}
	}
}

func (c *Controller) holdsPods(name string) bool {
	pods, err := c.podsOn(name)
	return err == nil && len(pods) > 0
}

// beat is a sign of life as the node wrote it, and when it was first seen
// here. The node's clock is only compared with itself.
type beat struct {
	mark mark
	at   time.Time
}

// mark is when a node says that it renewed its Lease and reported its status,
// in microseconds of its clock; zero if it did not.
type mark struct{ renewed, reported int64 }

// heartbeat returns when the last sign of life of a node that the failure
// detector does not know was seen here: a renewal of its Lease, or a status
// that its agent wrote. It is the zero time for a node that was said to be lost
// before this leader came and has given none since. c.mu is held.
func (c *Controller) heartbeat(n *corev1.Node, now time.Time) time.Time {
	var m mark
	if lease, err := c.lease.Leases(corev1.NamespaceNodeLease).Get(n.Name); err == nil && lease.Spec.RenewTime != nil {
		m.renewed = lease.Spec.RenewTime.UnixMicro()
	}
	ready := condition(n, corev1.NodeReady)
	if ready != nil && ready.Reason != reasonNever { // that one a leader wrote
		m.reported = ready.LastHeartbeatTime.UnixMicro()
	}
	b, seen := c.beats[n.Name]
	switch {
	case seen && b.mark == m:
		return b.at
	case !seen && ready != nil && ready.Status == corev1.ConditionUnknown:
		b = beat{mark: m}
	default:
		b = beat{mark: m, at: now}
	}
	c.beats[n.Name] = b
	return b.at
}
