package members

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/logbridge"
	"skein.io/skein/consensus/shard"
)

// Leaders is what a Balancer needs of host.Host.
type Leaders interface {
	Shards() shard.Table
	Status() []host.ShardStatus
	TransferLeadership(ctx context.Context, shardName string, to uint64) error
}

// BalancerConfig configures a Balancer.
type BalancerConfig struct {
	Store Leaders
	// Decisions are Manager.Decisions: leaderships move only while no replicas do.
	Decisions func() map[string]Decision
	// Members as in Config.
	Members func() []Node
	// RTT to a node by its NodeHostID, false if unknown. Optional.
	RTT func(nodeHostID string) (time.Duration, bool)
	// Far is what Spread is given; default 10 ms, which is what a write costs that
	// waits for a disk.
	Far time.Duration
	// Settle is how long the same move has to be due before it is made, default 5 s;
	// Pause is the least time between two moves, default 15 s, doubled with every
	// one that fails, up to 16 times. Interval is that between two looks, default 1 s;
	// they are at memory only.
	Settle, Pause, Interval time.Duration
	Logger                  *slog.Logger
}

// Balancer carries out what Spread decides: one transfer at a time, rarely.
type Balancer struct {
	cfg BalancerConfig
	log *slog.Logger
}

// NewBalancer returns a Balancer; it does nothing by itself.
func NewBalancer(cfg BalancerConfig) (*Balancer, error) {
	if cfg.Store == nil || cfg.Decisions == nil || cfg.Members == nil {
		return nil, errors.New("balancer: Store, Decisions and Members have to be set")
	}
	if cfg.RTT == nil {
		cfg.RTT = func(string) (time.Duration, bool) { return 0, false }
	}
	for p, v := range map[*time.Duration]time.Duration{&cfg.Far: 10 * time.Millisecond, &cfg.Settle: 5 * time.Second, &cfg.Pause: 15 * time.Second, &cfg.Interval: time.Second} {
		if *p == 0 {
			*p = v
		}
	}
	return &Balancer{cfg: cfg, log: logbridge.OrDiscard(cfg.Logger).With("component", "balancer")}, nil
}

// Run works until ctx ends. It is for the cluster's leader, beside Manager.Run.
func (b *Balancer) Run(ctx context.Context) {
	tick := time.NewTicker(b.cfg.Interval)
	defer tick.Stop()
	var due Move
	var since, last time.Time // since when due is due; the last attempt
	failed := 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		m, ok := Spread(b.seats(), b.cfg.Far)
		switch {
		case !ok:
			due = Move{}
			continue
		case m.Shard != due.Shard || m.From != due.From || m.To != due.To:
			due, since = m, time.Now()
			continue
		case time.Since(since) < b.cfg.Settle || time.Since(last) < b.cfg.Pause<<failed:
			continue
		}
		tctx, cancel := context.WithTimeout(ctx, orderTimeout)
		err := b.cfg.Store.TransferLeadership(tctx, m.Shard, m.Replica)
		cancel()
		if ctx.Err() != nil {
			return
		}
		last, due = time.Now(), Move{}
		if err != nil {
			failed = min(failed+1, 4)
			b.log.Info("leadership not moved", "shard", m.Shard, "to", m.To, "error", err)
			continue
		}
		failed = 0
		b.log.Info("leadership moved", "shard", m.Shard, "reason", m.Reason)
	}
}

// seats are the leaderships of all shards, nil while replicas are being moved.
func (b *Balancer) seats() (out []Seat) {
	decisions := b.cfg.Decisions()
	nodes := map[string]Node{}
	for _, n := range b.cfg.Members() {
		nodes[n.ID] = n
	}
	for _, st := range b.cfg.Store.Status() {
		d, ok := decisions[st.Shard]
		if !ok || d.Step.Action != Nothing {
			return nil
		}
		s, _ := b.cfg.Store.Shards().ByName(st.Shard)
		seat := Seat{Shard: st.Shard, System: s.ID == shard.System, Leader: st.Leader.NodeHostID}
		for _, v := range st.Voters {
			n := nodes[v.NodeHostID]
			c := Candidate{Node: v.NodeHostID, Name: v.Node, Replica: v.Replica,
				Fit: n.ID != "" && n.State == Alive && !n.Leaving && n.Voter != Never && !d.Slow[v.NodeHostID] && slices.Contains(d.Goal, v.NodeHostID)}
			c.RTT, _ = b.cfg.RTT(v.NodeHostID)
			seat.Voters = append(seat.Voters, c)
		}
		out = append(out, seat)
	}
	return out
}
