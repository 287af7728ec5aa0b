// Package space decides how a shard stays small: which revisions to compact, when
// a database is worth rewriting, when a shard is full, and which replica's data
// differs from the others'. Everything here is pure: time and sizes are
// arguments, and nothing is done. Package host acts on it.
package space

import (
	"errors"
	"fmt"
	"time"
)

// Config says how much of the past and how much space a shard may hold. The
// zero value of a field means its default.
type Config struct {
	// Quota bounds what a shard has in use on this replica, in bytes: from there on
	// it takes nothing that makes it grow. Default 2 GiB, as etcd; negative: none.
	// It has to be the same on all nodes.
	Quota int64
	// Retention is how long superseded revisions can still be read and watched from;
	// default 5 min, as kube-apiserver keeps them.
	Retention time.Duration
	// MaxRevisions bounds the revisions that are kept, if they are older than
	// MinRetention: under a high churn history is shorter. Defaults 250,000 and
	// Retention/10. MinRetention also is what is left of history once three quarters
	// of Quota are in use.
	MaxRevisions int64
	MinRetention time.Duration
	// A database is rewritten when at least DefragFree bytes (default 64 MiB) and
	// DefragRatio of the file (default 0.5) are free pages.
	DefragFree  int64
	DefragRatio float64
	// DefragInterval is the least time between two rewrites of one replica; default
	// 10 min.
	DefragInterval time.Duration
	// CheckInterval is how often the leader compares its data with the replicas';
	// default Retention.
	CheckInterval time.Duration
}

// SetDefaults fills in what is not set.
func (c *Config) SetDefaults() {
	def := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	dur := func(p *time.Duration, v time.Duration) {
		if *p == 0 {
			*p = v
		}
	}
	def(&c.Quota, 2<<30)
	def(&c.MaxRevisions, 250_000)
	def(&c.DefragFree, 64<<20)
	dur(&c.Retention, 5*time.Minute)
	dur(&c.MinRetention, c.Retention/10)
	dur(&c.DefragInterval, 10*time.Minute)
	dur(&c.CheckInterval, c.Retention)
	if c.DefragRatio == 0 {
		c.DefragRatio = 0.5
	}
}

// Validate reports everything that is wrong.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Quota >= 0 && c.Quota < 16<<20 {
		bad("Quota %d: it has to be 16 MiB at least, or negative for none", c.Quota)
	}
	if c.Retention < time.Second {
		bad("Retention %v: it has to be 1 s at least", c.Retention)
	}
	if c.MinRetention <= 0 || c.MinRetention > c.Retention {
		bad("MinRetention %v: it has to be above 0 and at most Retention (%v)", c.MinRetention, c.Retention)
	}
	if c.MaxRevisions < 1000 {
		bad("MaxRevisions %d: it has to be 1000 at least", c.MaxRevisions)
	}
	if c.DefragFree < 1<<20 {
		bad("DefragFree %d: it has to be 1 MiB at least", c.DefragFree)
	}
	if c.DefragRatio < 0.05 || c.DefragRatio >= 1 {
		bad("DefragRatio %v: it has to be from 0.05 to below 1", c.DefragRatio)
	}
	if c.DefragInterval < 0 || c.CheckInterval < 0 {
		bad("DefragInterval %v, CheckInterval %v: they must not be negative", c.DefragInterval, c.CheckInterval)
	}
	return errors.Join(errs...)
}

// Tick is how often a replica notes its revision.
func (c Config) Tick() time.Duration {
	return max(20*time.Millisecond, min(c.MinRetention/5, 5*time.Second))
}

// Pages of a database.
type Pages struct {
	// Size of the file and what is in use of it, in bytes.
	Size, InUse int64
}

// Full tells whether a shard may not grow by so many bytes.
func (c Config) Full(inUse, by int64) bool { return c.Quota > 0 && inUse+by > c.Quota }

// Roomy tells whether a shard that was full may grow again. A tenth of the quota
// lies between the two, so that the alarm does not go on and off with every write.
func (c Config) Roomy(inUse int64) bool { return c.Quota <= 0 || inUse < c.Quota/10*9 }

// WorthDefrag tells whether rewriting a database would free enough; since is the
// time since the last time.
func (c Config) WorthDefrag(p Pages, since time.Duration) bool {
	free := p.Size - p.InUse
	return free >= c.DefragFree && float64(free) >= c.DefragRatio*float64(p.Size) && since >= c.DefragInterval
}
