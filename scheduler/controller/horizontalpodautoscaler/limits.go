package horizontalpodautoscaler

import (
	"math"
	"slices"
	"time"

	autoscalingv2 "k8s.io/api/autoscaling/v2"
)

// history is what was recommended and done lately for one autoscaler: what must not swing to and fro is decided by it. It is lost with the leadership, as
// upstream's is with its process; then nothing is scaled down for a window.
type history struct {
	recommended []recommendation
	ups, downs  []change
}

type recommendation struct {
	replicas int32
	at       time.Time
}

// change is by how many replicas a target was scaled.
type change struct {
	by int32
	at time.Time
}

// since keeps what is younger than a window, for the caller to append to.
func since[T any](list []T, at func(T) time.Time, cutoff time.Time) []T {
	return slices.DeleteFunc(slices.Clone(list), func(x T) bool { return at(x).Before(cutoff) })
}

func seconds(n int32) time.Duration { return time.Duration(n) * time.Second }

// begin notes the count that an autoscaler found, so that its first recommendations do not undo it at once.
func (h history) begin(current int32, now time.Time) history {
	if h.recommended == nil {
		h.recommended = []recommendation{{current, now}}
	}
	return h
}

// bounds are between which counts, and from which, a decision is made.
type bounds struct {
	current, desired, lowest, highest int32
	rules                             *autoscalingv2.HorizontalPodAutoscalerBehavior // nil: none
}

// limited is a count, and why it is not the one that the metrics asked for.
type limited struct {
	replicas, stabilized          int32
	ableReason, ableMessage       string
	limitedReason, limitedMessage string
}

const (
	lowestRecent   = "recent recommendations were lower than current one, applying the lowest recent recommendation"
	highestRecent  = "recent recommendations were higher than current one, applying the highest recent recommendation"
	tooFast        = "the desired replica count is increasing faster than the maximum scale rate"
	tooFastDown    = "the desired replica count is decreasing faster than the maximum scale rate"
	aboveMaximum   = "the desired replica count is more than the maximum replica count"
	belowMinimum   = "the desired replica count is less than the minimum replica count"
	withinRange    = "the desired count is within the acceptable range"
	matchesCurrent = "recommended size matches current size"
)

// limit holds a recommendation back by recent ones, by the rates of the rules (or the default ones), and by the least and most replicas.
func (h history) limit(b bounds, now time.Time) (limited, history) {
	var l limited
	reason, message := "ScaleDownStabilized", highestRecent
	if b.rules == nil {
		l.stabilized, h = h.highest(b.desired, now)
	} else {
		l.stabilized, h = h.between(b, now)
		if b.desired >= b.current {
			reason, message = "ScaleUpStabilized", lowestRecent
		}
	}
	l.ableReason, l.ableMessage = "ReadyForNewScale", matchesCurrent
	if l.stabilized != b.desired {
		l.ableReason, l.ableMessage = reason, message
	}
	b.desired = l.stabilized
	if b.rules == nil {
		l.replicas, l.limitedReason, l.limitedMessage = byDefaultRules(b)
	} else {
		l.replicas, l.limitedReason, l.limitedMessage = h.byRules(b, now)
	}
	return l, h
}

// highest is the largest recommendation of the default window.
func (h history) highest(desired int32, now time.Time) (int32, history) {
	top := desired
	recent := since(h.recommended, func(r recommendation) time.Time { return r.at }, now.Add(-downWindow))
	for _, r := range recent {
		top = max(top, r.replicas)
	}
	h.recommended = append(recent, recommendation{desired, now})
	return top, h
}

// between brings the current count up to the lowest recommendation of the window for more replicas, and down to the highest of that for fewer.
func (h history) between(b bounds, now time.Time) (int32, history) {
	upCutoff := now.Add(-seconds(window(b.rules.ScaleUp, 0)))
	downCutoff := now.Add(-seconds(window(b.rules.ScaleDown, int32(downWindow/time.Second))))
	up, down := b.desired, b.desired
	for _, r := range h.recommended {
		if r.at.After(upCutoff) {
			up = min(up, r.replicas)
		}
		if r.at.After(downCutoff) {
			down = max(down, r.replicas)
		}
	}
	earlier := upCutoff
	if downCutoff.Before(earlier) {
		earlier = downCutoff
	}
	h.recommended = append(since(h.recommended, func(r recommendation) time.Time { return r.at }, earlier), recommendation{b.desired, now})
	return min(max(b.current, up), down), h
}

func window(r *autoscalingv2.HPAScalingRules, otherwise int32) int32 {
	if r == nil || r.StabilizationWindowSeconds == nil {
		return otherwise
	}
	return *r.StabilizationWindowSeconds
}

// byDefaultRules doubles at most, or goes to four.
func byDefaultRules(b bounds) (int32, string, string) {
	highest, reason, message := b.highest, "TooManyReplicas", aboveMaximum
	if fast := int32(math.Max(scaleUpFactor*float64(b.current), scaleUpMinimum)); b.highest > fast {
		highest, reason, message = fast, "ScaleUpLimit", tooFast
	}
	switch {
	case b.desired < b.lowest:
		return b.lowest, "TooFewReplicas", belowMinimum
	case b.desired > highest:
		return highest, reason, message
	}
	return b.desired, "DesiredWithinRange", withinRange
}

// byRules applies the autoscaler's own rates.
func (h history) byRules(b bounds, now time.Time) (int32, string, string) {
	switch {
	case b.desired > b.current:
		highest, reason, message := b.highest, "TooManyReplicas", aboveMaximum
		if rate := max(b.current, h.rateUp(b.current, b.rules.ScaleUp, now)); highest > rate {
			highest, reason, message = rate, "ScaleUpLimit", tooFast
		}
		if b.desired > highest {
			return highest, reason, message
		}
	case b.desired < b.current:
		lowest, reason, message := b.lowest, "TooFewReplicas", belowMinimum
		if rate := min(b.current, h.rateDown(b.current, b.rules.ScaleDown, now)); lowest < rate {
			lowest, reason, message = rate, "ScaleDownLimit", tooFastDown
		}
		if b.desired < lowest {
			return lowest, reason, message
		}
	}
	return b.desired, "DesiredWithinRange", withinRange
}

// rateUp is how many replicas there may be now by rules for more. The API's defaults fill all rules in.
func (h history) rateUp(current int32, r *autoscalingv2.HPAScalingRules, now time.Time) int32 {
	return h.rate(current, r, now, func(was, value int32, percent bool) int32 {
		if percent { // rounded up: else one replica would never become two
			return int32(math.Ceil(float64(was) * (1 + float64(value)/100)))
		}
		return was + value
	}, true)
}

// rateDown is to how few replicas it may go now by rules for fewer.
func (h history) rateDown(current int32, r *autoscalingv2.HPAScalingRules, now time.Time) int32 {
	return h.rate(current, r, now, func(was, value int32, percent bool) int32 {
		if percent {
			return int32(float64(was) * (1 - float64(value)/100))
		}
		return was - value
	}, false)
}

func (h history) rate(current int32, r *autoscalingv2.HPAScalingRules, now time.Time, propose func(was, value int32, percent bool) int32, up bool) int32 {
	choice := autoscalingv2.MaxChangePolicySelect
	if r != nil && r.SelectPolicy != nil {
		choice = *r.SelectPolicy
	}
	if r == nil || choice == autoscalingv2.DisabledPolicySelect {
		return current
	}
	largest := up == (choice != autoscalingv2.MinChangePolicySelect)
	result := int32(math.MaxInt32)
	if largest {
		result = math.MinInt32
	}
	for _, p := range r.Policies {
		was := current - changed(h.ups, p.PeriodSeconds, now) + changed(h.downs, p.PeriodSeconds, now)
		proposed := propose(was, p.Value, p.Type == autoscalingv2.PercentScalingPolicy)
		if largest {
			result = max(result, proposed)
		} else {
			result = min(result, proposed)
		}
	}
	return result
}

// changed adds up what was scaled within a period.
func changed(list []change, period int32, now time.Time) (sum int32) {
	cutoff := now.Add(-seconds(period))
	for _, c := range list {
		if c.at.After(cutoff) {
			sum += c.by
		}
	}
	return sum
}

// scaled notes that a target was scaled, for as long as the rules ask.
func (h history) scaled(rules *autoscalingv2.HorizontalPodAutoscalerBehavior, from, to int32, now time.Time) history {
	if rules == nil {
		return h
	}
	note := func(list []change, r *autoscalingv2.HPAScalingRules, by int32) []change {
		var longest int32
		if r != nil {
			for _, p := range r.Policies {
				longest = max(longest, p.PeriodSeconds)
			}
		}
		return append(since(list, func(c change) time.Time { return c.at }, now.Add(-seconds(longest))), change{by, now})
	}
	if to > from {
		h.ups = note(h.ups, rules.ScaleUp, to-from)
	} else {
		h.downs = note(h.downs, rules.ScaleDown, from-to)
	}
	return h
}
