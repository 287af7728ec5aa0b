package host

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"skein.io/skein/consensus/shard"
)

// buckets of all latencies, in seconds: a write on a fast disk takes well below a
// millisecond, an election about one second, a request gives up after six.
var buckets = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// meters count what a host does. They live as long as it; those of a shard do not
// end with its replica.
type meters struct {
	sync prometheus.Histogram
	of   map[shard.ID]*meter
}

type meter struct {
	propose, apply prometheus.Histogram
	pending        atomic.Int64
	failed         prometheus.Counter
}

func newMeters(table shard.Table) *meters {
	histogram := func(name, help string, labels prometheus.Labels) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "skein", Subsystem: "store", Name: name, Help: help, ConstLabels: labels, Buckets: buckets})
	}
	m := &meters{sync: histogram("log_sync_seconds", "Time to make a batch of all shards durable in the Raft log.", nil), of: map[shard.ID]*meter{}}
	for _, s := range table.Shards() {
		l := prometheus.Labels{"shard": s.Name}
		m.of[s.ID] = &meter{
			propose: histogram("propose_seconds", "Time from a request to its result, for requests made on this node.", l),
			apply:   histogram("apply_seconds", "Time to apply a batch of log entries.", l),
			failed: prometheus.NewCounter(prometheus.CounterOpts{Namespace: "skein", Subsystem: "store", Name: "proposals_failed_total",
				Help: "Requests made on this node that ended without a result of the state machine.", ConstLabels: l}),
		}
	}
	return m
}

// end counts the end of a request, whose beginning was counted in pending.
func (m *meter) end(start time.Time, err error) {
	m.pending.Add(-1)
	m.propose.Observe(time.Since(start).Seconds())
	if err != nil {
		m.failed.Inc()
	}
}

// gauge is a number of ShardStatus.
type gauge struct {
	desc  *prometheus.Desc
	value func(ShardStatus) float64
}

func is(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

var gauges = func() (out []gauge) {
	add := func(name, help string, f func(ShardStatus) float64) {
		out = append(out, gauge{prometheus.NewDesc("skein_store_"+name, help, []string{"shard"}, nil), f})
	}
	add("has_replica", "1 if this node holds a replica of the shard.", func(s ShardStatus) float64 { return is(s.Role != RoleNone) })
	add("has_leader", "1 if the replica knows a leader.", func(s ShardStatus) float64 { return is(s.Leader.Replica != 0) })
	add("is_leader", "1 if the replica is the leader.", func(s ShardStatus) float64 { return is(s.Role == RoleLeader) })
	add("ready", "1 if the replica has caught up and hears its leader.", func(s ShardStatus) float64 { return is(s.Ready) })
	add("leader_silence_seconds", "How long no leader has been heard.", func(s ShardStatus) float64 { return s.SinceContact.Seconds() })
	add("term", "Raft's term.", func(s ShardStatus) float64 { return float64(RaftTerm(s.Term)) })
	add("applied_index", "Index of the last applied log entry.", func(s ShardStatus) float64 { return float64(s.Applied) })
	add("revision", "etcd's revision.", func(s ShardStatus) float64 { return float64(s.Revision) })
	add("voters", "Voters of the shard.", func(s ShardStatus) float64 { return float64(len(s.Voters)) })
	add("spares", "Replicas without a vote.", func(s ShardStatus) float64 { return float64(len(s.NonVoters)) })
	add("db_size_bytes", "Size of the database.", func(s ShardStatus) float64 { return float64(s.Size) })
	add("db_in_use_bytes", "What of it is in use.", func(s ShardStatus) float64 { return float64(s.SizeInUse) })
	add("db_quota_bytes", "What may be in use; negative for no bound.", func(s ShardStatus) float64 { return float64(s.Quota) })
	add("alarms", "Active alarms.", func(s ShardStatus) float64 { return float64(len(s.Alarms)) })
	return out
}()

var pendingDesc = prometheus.NewDesc("skein_store_proposals_pending", "Requests made on this node that wait for their result.", []string{"shard"}, nil)

var _ prometheus.Collector = (*Host)(nil)

// Describe implements prometheus.Collector.
func (h *Host) Describe(c chan<- *prometheus.Desc) {
	for _, g := range gauges {
		c <- g.desc
	}
	c <- pendingDesc
	h.meters.sync.Describe(c)
	for _, m := range h.meters.of {
		m.propose.Describe(c)
		m.apply.Describe(c)
		m.failed.Describe(c)
	}
}

// Collect implements prometheus.Collector: every shard's state and latencies. A
// shard of which this node holds no replica shows has_replica 0 and no other state.
func (h *Host) Collect(c chan<- prometheus.Metric) {
	for _, s := range h.Status() {
		for _, g := range gauges {
			c <- prometheus.MustNewConstMetric(g.desc, prometheus.GaugeValue, g.value(s), s.Shard)
			if s.Role == RoleNone {
				break
			}
		}
	}
	h.meters.sync.Collect(c)
	for _, s := range h.cfg.Shards.Shards() {
		m := h.meters.of[s.ID]
		c <- prometheus.MustNewConstMetric(pendingDesc, prometheus.GaugeValue, float64(m.pending.Load()), s.Name)
		m.propose.Collect(c)
		m.apply.Collect(c)
		m.failed.Collect(c)
	}
}
