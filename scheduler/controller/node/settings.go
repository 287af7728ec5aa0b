package node

import (
	"cmp"
	"errors"
	"fmt"
	"time"
)

// Settings are what an operator may change about the life of nodes.
type Settings struct {
	// CheckEvery is how often nodes that the failure detector does not know are
	// looked at. Default 5 s, as upstream's node-monitor-period.
	CheckEvery time.Duration
	// HeartbeatGrace is how long a node that the failure detector does not know
	// (made by hand, or by another kubelet) may give no sign of life before it
	// is lost. Default 50 s, as upstream's node-monitor-grace-period.
	HeartbeatGrace time.Duration
	// StartupGrace is the same for such a node that has never reported. Default
	// 60 s, as upstream's node-startup-grace-period.
	StartupGrace time.Duration
	// UnhealthyFraction is the part of a zone's nodes, at least 3 of them, whose
	// loss looks like a partition and not like deaths. Default 0.55, as
	// upstream's unhealthy-zone-threshold.
	UnhealthyFraction float64
	// LargeZone is the number of nodes above which evictions go on slowly under
	// such a loss; in smaller zones they stop. Default 50, as upstream's
	// large-cluster-size-threshold.
	LargeZone int
	// SlowEvery is the time between two nodes whose pods are evicted in a large
	// zone under such a loss. Default 100 s (upstream's rate of 0.01/s).
	SlowEvery time.Duration
	// DarkEvery is the same in a zone that is lost as a whole while others live.
	// Default 10 s (upstream's rate of 0.1/s).
	DarkEvery time.Duration
	// Workers is how many nodes are worked on at once. Default 8.
	Workers int
	// Board shows what the brake does; nil for none.
	Board *Board
}

// DefaultSettings returns the documented defaults.
func DefaultSettings() Settings {
	return Settings{
		CheckEvery: 5 * time.Second, HeartbeatGrace: 50 * time.Second, StartupGrace: 60 * time.Second,
		UnhealthyFraction: 0.55, LargeZone: 50, SlowEvery: 100 * time.Second, DarkEvery: 10 * time.Second,
		Workers: 8,
	}
}

func (s *Settings) setDefaults() {
	d := DefaultSettings()
	s.CheckEvery = cmp.Or(s.CheckEvery, d.CheckEvery)
	s.HeartbeatGrace = cmp.Or(s.HeartbeatGrace, d.HeartbeatGrace)
	s.StartupGrace = cmp.Or(s.StartupGrace, d.StartupGrace)
	s.UnhealthyFraction = cmp.Or(s.UnhealthyFraction, d.UnhealthyFraction)
	s.LargeZone = cmp.Or(s.LargeZone, d.LargeZone)
	s.SlowEvery = cmp.Or(s.SlowEvery, d.SlowEvery)
	s.DarkEvery = cmp.Or(s.DarkEvery, d.DarkEvery)
	s.Workers = cmp.Or(s.Workers, d.Workers)
}

// Validate reports all faults of the settings at once.
func (s Settings) Validate() error {
	s.setDefaults()
	var errs []error
	for _, d := range []struct {
		name string
		d    time.Duration
	}{
		{"CheckEvery", s.CheckEvery}, {"HeartbeatGrace", s.HeartbeatGrace}, {"StartupGrace", s.StartupGrace},
		{"SlowEvery", s.SlowEvery}, {"DarkEvery", s.DarkEvery},
	} {
		if d.d < 0 {
			errs = append(errs, fmt.Errorf("node: %s is negative: %v", d.name, d.d))
		}
	}
	if s.UnhealthyFraction <= 0 || s.UnhealthyFraction > 1 {
		errs = append(errs, fmt.Errorf("node: UnhealthyFraction is not above 0 and at most 1: %v", s.UnhealthyFraction))
	}
	if s.LargeZone < 0 || s.Workers < 0 {
		errs = append(errs, fmt.Errorf("node: LargeZone %d or Workers %d is negative", s.LargeZone, s.Workers))
	}
	return errors.Join(errs...)
}
