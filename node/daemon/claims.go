package daemon

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"skein.io/skein/scheduler/controller/resourceclaim"
)

// claimMetrics shows the claims of dynamic resources as upstream's resource claim controller does. Only the leader has them.
type claimMetrics struct{ board *resourceclaim.Board }

var _ prometheus.Collector = claimMetrics{}

var (
	claimsDesc = prometheus.NewDesc("resourceclaim_controller_resource_claims",
		"Number of ResourceClaims, categorized by allocation status, admin access, and source.", []string{"allocated", "admin_access", "source"}, nil)
	claimCreatesDesc = prometheus.NewDesc("resourceclaim_controller_creates_total",
		"Number of ResourceClaims creation requests, categorized by creation status and admin access, since this node started.", []string{"status", "admin_access"}, nil)
)

// Describe implements prometheus.Collector.
func (m claimMetrics) Describe(c chan<- *prometheus.Desc) {
	c <- claimsDesc
	c <- claimCreatesDesc
}

// Collect implements prometheus.Collector.
func (m claimMetrics) Collect(c chan<- prometheus.Metric) {
	for k, n := range m.board.Claims() {
		c <- prometheus.MustNewConstMetric(claimsDesc, prometheus.GaugeValue, float64(n), strconv.FormatBool(k.Allocated), strconv.FormatBool(k.AdminAccess), k.Source)
	}
	for k, n := range m.board.Creations() {
		status := "failure"
		if k.OK {
			status = "success"
		}
		c <- prometheus.MustNewConstMetric(claimCreatesDesc, prometheus.CounterValue, float64(n), status, strconv.FormatBool(k.AdminAccess))
	}
}
