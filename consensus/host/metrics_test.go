package host_test

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"skein.io/skein/consensus/internal/storetest"
)

// Every shard shows its state and latencies; a shard without a replica here only
// that it has none.
func TestMetrics(t *testing.T) {
	c := storetest.New(t, 2, nil)
	c.Voters(1)
	for shard := range keyIn {
		if err := write(t, c.Nodes[0], shard, 0, "x"); err != nil {
			t.Fatal(err)
		}
	}
	if err := write(t, c.Nodes[0], "pods", 0, string(make([]byte, 2<<20))); err == nil {
		t.Fatal("a value of 2 MiB was taken")
	}
	got := gather(t, c.Nodes[0])
	for shard, failed := range map[string]float64{"system": 0, "pods": 1, "events": 0} {
		for name, want := range map[string]float64{"has_replica": 1, "has_leader": 1, "is_leader": 1, "ready": 1, "voters": 1, "spares": 0, "alarms": 0,
			"proposals_pending": 0, "leader_silence_seconds": 0, "proposals_failed_total": failed} {
			if m := got["skein_store_"+name][shard]; m == nil || m.GetGauge().GetValue()+m.GetCounter().GetValue() != want {
				t.Errorf("%s of %s is %v, want %v", name, shard, m, want)
			}
		}
		for _, name := range []string{"term", "applied_index", "revision", "db_size_bytes", "db_in_use_bytes"} {
			if m := got["skein_store_"+name][shard]; m.GetGauge().GetValue() <= 0 {
				t.Errorf("%s of %s is %v", name, shard, m)
			}
		}
		for _, name := range []string{"propose_seconds", "apply_seconds"} {
			if m := got["skein_store_"+name][shard]; m.GetHistogram().GetSampleCount() == 0 || m.GetHistogram().GetSampleSum() <= 0 {
				t.Errorf("%s of %s is %v", name, shard, m)
			}
		}
	}
	if m := got["skein_store_log_sync_seconds"][""]; m.GetHistogram().GetSampleCount() == 0 {
		t.Errorf("log_sync_seconds is %v", m)
	}
	none := gather(t, c.Nodes[1])
	if m := none["skein_store_has_replica"]["pods"]; m == nil || m.GetGauge().GetValue() != 0 || none["skein_store_has_leader"]["pods"] != nil {
		t.Errorf("a node without replicas shows %v", none)
	}
}

// gather returns all metrics by name and shard.
func gather(t *testing.T, n *storetest.Node) map[string]map[string]*dto.Metric {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(n.Host()); err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]map[string]*dto.Metric{}
	for _, f := range families {
		out[f.GetName()] = map[string]*dto.Metric{}
		for _, m := range f.Metric {
			shard := ""
			for _, l := range m.Label {
				if l.GetName() == "shard" {
					shard = l.GetValue()
				}
			}
			out[f.GetName()][shard] = m
		}
	}
	return out
}
