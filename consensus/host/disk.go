package host

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"
)

// Disk tells how long this node's disk takes to make a write durable, which every
// write to a shard waits for on a majority of its voters.
type Disk struct {
	// Sync is what nine of ten writes took at most; 0 when too little is known.
	Sync time.Duration
	// Slow is the verdict; see DiskRules.
	Slow bool
	// Since is how long the verdict has stood.
	Since time.Duration
}

// DiskRules turn latencies into a verdict that does not flap. The zero value of a
// field means its default. etcd wants 99 of a hundred fsyncs within 10 ms (its
// tuning guide) and alerts at 500 ms (etcdHighFsyncDurations); at two heartbeats,
// 200 ms, a follower's delay begins to look like its death.
type DiskRules struct {
	// Slow is from when on the disk counts as slow, default 200 ms, if it stays so
	// for SlowFor, default 30 s. Fast is below what it counts as fast again, default
	// half of Slow, if it stays so for FastFor, default 10 min.
	Slow, SlowFor, Fast, FastFor time.Duration
	// Interval between two measurements, default 10 s; a tenth of it while there is
	// reason for suspicion.
	Interval time.Duration
}

func (d *DiskRules) setDefaults() {
	d.Slow = cmp.Or(d.Slow, 200*time.Millisecond)
	d.SlowFor = cmp.Or(d.SlowFor, 30*time.Second)
	d.Fast = cmp.Or(d.Fast, d.Slow/2)
	d.FastFor = cmp.Or(d.FastFor, 10*time.Minute)
	d.Interval = cmp.Or(d.Interval, 10*time.Second)
}

func (d DiskRules) validate() error {
	if d.Slow < 0 || d.Fast < 0 || d.SlowFor < 0 || d.FastFor < 0 || d.Interval < 0 || d.Fast > d.Slow {
		return fmt.Errorf("Disk %+v: nothing may be negative, and Fast not above Slow", d)
	}
	return nil
}

const (
	// diskWindow is how many measurements a verdict looks at, diskEnough how many
	// it takes.
	diskWindow, diskEnough = 30, 20
	// diskRecent of them decide how soon the next is made.
	diskRecent = 5
	probeSize  = 4 << 10
)

// diskJudge is pure: times are arguments.
type diskJudge struct {
	rules   DiskRules
	last    []time.Duration // the newest last, at most window
	slow    bool
	changed time.Time // of slow
	since   time.Time // since when the measure speaks against the verdict; zero: it does not
}

func (j *diskJudge) observe(now time.Time, took time.Duration) {
	if j.changed.IsZero() {
		j.changed = now
	}
	j.last = append(j.last, took)
	if n := len(j.last) - diskWindow; n > 0 {
		j.last = slices.Delete(j.last, 0, n)
	}
	p := j.p90()
	against, long := p >= j.rules.Slow, j.rules.SlowFor
	if j.slow {
		against, long = p > 0 && p < j.rules.Fast, j.rules.FastFor
	}
	switch {
	case !against:
		j.since = time.Time{}
	case j.since.IsZero():
		j.since = now
	case now.Sub(j.since) >= long:
		j.slow, j.changed, j.since = !j.slow, now, time.Time{}
	}
}

// p90 is 0 while too little is known.
func (j *diskJudge) p90() time.Duration {
	if len(j.last) < diskEnough {
		return 0
	}
	s := slices.Sorted(slices.Values(j.last))
	return s[(len(s)*9+9)/10-1]
}

// pause until the next probe. A probe that took long is followed soon: it takes
// many to be sure.
func (j *diskJudge) pause() time.Duration {
	if len(j.last) < diskEnough || j.slow || slices.Max(j.last[len(j.last)-diskRecent:]) >= j.rules.Fast {
		return j.rules.Interval / 10
	}
	return j.rules.Interval
}

// prober measures the disk while this node holds a replica.
type prober struct {
	measure func() (time.Duration, error)

	mu    sync.Mutex // guards judge
	judge diskJudge
}

// measureDisk overwrites a block of 4 KiB, what Raft's log writes for a small
// command, and makes it durable.
func measureDisk(path string) (time.Duration, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	_, err = f.WriteAt(make([]byte, probeSize), 0)
	err = errors.Join(err, f.Sync())
	took := time.Since(began)
	return took, errors.Join(err, f.Close())
}

func (p *prober) health(now time.Time) Disk {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := Disk{Sync: p.judge.p90(), Slow: p.judge.slow}
	if !p.judge.changed.IsZero() {
		d.Since = now.Sub(p.judge.changed)
	}
	return d
}

func (h *Host) probeDisk() {
	p := h.disk
	t := time.NewTimer(h.cfg.Disk.Interval / 10)
	defer t.Stop()
	for {
		select {
		case <-h.ctx.Done():
			return
		case <-t.C:
		}
		pause := h.cfg.Disk.Interval
		if h.holds() {
			took, err := p.measure()
			p.mu.Lock()
			was := p.judge.slow
			if err == nil {
				p.judge.observe(time.Now(), took)
			}
			is, p90 := p.judge.slow, p.judge.p90()
			pause = p.judge.pause()
			p.mu.Unlock()
			switch {
			case err != nil: // a full or broken disk says so elsewhere
				h.log.Debug("cannot measure the disk", "error", err)
			case is != was:
				h.log.Warn("the verdict on this node's disk has changed", "slow", is, "fsyncP90", p90)
			}
		}
		t.Reset(pause)
	}
}

// holds: this node has a replica of some shard.
func (h *Host) holds() bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return len(h.replicas) > 0
}

// Disk returns what this node knows of its own disk; it is measured while the
// node holds a replica.
func (h *Host) Disk() Disk { return h.disk.health(time.Now()) }
