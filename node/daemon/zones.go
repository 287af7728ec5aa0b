package daemon

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"skein.io/skein/node/client"
	nodes "skein.io/skein/scheduler/controller/node"
)

// leaderWord is what the leader tells other nodes for their status. The placement's fields stand beside the zones, as
// nodes that know nothing of zones expect.
type leaderWord struct {
	*client.Placement
	Zones []client.Zone `json:"zones,omitempty"`
}

// zoneStates shows people how each zone fares.
func zoneStates(states []nodes.ZoneState, now time.Time) []client.Zone {
	var out []client.Zone
	for _, z := range states {
		out = append(out, client.Zone{
			Name: z.Zone, Ready: z.Ready, NotReady: z.NotReady, Evictions: z.Pace.String(), Braked: z.Pace != nodes.Pace{},
			SinceSeconds: now.Sub(z.Since).Seconds(), Held: z.Held, Brakes: z.Brakes,
		})
	}
	return out
}

// zoneMetrics shows the zones as upstream's node lifecycle controller does, and what its metrics do not tell of the brake.
// Only the leader has them.
type zoneMetrics struct{ board *nodes.Board }

var _ prometheus.Collector = zoneMetrics{}

type zoneMetric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(nodes.ZoneState) float64
}

var zoneMetricList = func() (out []zoneMetric) {
	add := func(name, help string, kind prometheus.ValueType, f func(nodes.ZoneState) float64) {
		out = append(out, zoneMetric{prometheus.NewDesc(name, help, []string{"zone"}, nil), kind, f})
	}
	gauge, counter := prometheus.GaugeValue, prometheus.CounterValue
	size := func(z nodes.ZoneState) float64 { return float64(z.Ready + z.NotReady) }
	add("node_collector_zone_size", "Nodes of the zone.", gauge, size)
	add("node_collector_zone_health", "Percent of the zone's nodes that are ready.", gauge, func(z nodes.ZoneState) float64 { return 100 * float64(z.Ready) / size(z) })
	add("node_collector_unhealthy_nodes_in_zone", "Nodes of the zone that are not ready.", gauge, func(z nodes.ZoneState) float64 { return float64(z.NotReady) })
	add("node_collector_evictions_total", "Nodes from which pods were driven off, since this node started.", counter, func(z nodes.ZoneState) float64 { return float64(z.Evictions) })
	add("skein_evictions_held_nodes", "Lost nodes that keep their pods because too much of the zone is lost.", gauge, func(z nodes.ZoneState) float64 { return float64(z.Held) })
	add("skein_evictions_braked", "1 if evictions in the zone are slowed or stopped.", gauge, func(z nodes.ZoneState) float64 {
		if z.Pace == (nodes.Pace{}) {
			return 0
		}
		return 1
	})
	add("skein_eviction_brakes_total", "How often evictions in the zone were slowed or stopped, since this node started.", counter, func(z nodes.ZoneState) float64 { return float64(z.Brakes) })
	return out
}()

// Describe implements prometheus.Collector.
func (m zoneMetrics) Describe(c chan<- *prometheus.Desc) {
	for _, x := range zoneMetricList {
		c <- x.desc
	}
}

// Collect implements prometheus.Collector.
func (m zoneMetrics) Collect(c chan<- prometheus.Metric) {
	for _, z := range m.board.Zones() {
		for _, x := range zoneMetricList {
			c <- prometheus.MustNewConstMetric(x.desc, x.kind, x.value(z), z.Zone)
		}
	}
}
