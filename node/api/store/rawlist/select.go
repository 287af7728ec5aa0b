package rawlist

import (
	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/apiserver/pkg/storage"
)

// Numbers of further fields of a pod.
const (
	metaName            = 1
	metaNamespace       = 3
	specRestartPolicy   = 3
	specServiceAccount  = 8
	specScheduler       = 19
	statusPhase         = 1
	optional, mandatory = false, true
)

// selectable are fields of pods by which they are selected (ToSelectableFields in pkg/registry/core/pod): where they are, and whether an API never leaves them empty.
// The others are not to be found in one place.
var selectable = map[string]struct {
	part, field protowire.Number
	mandatory   bool
}{
	"metadata.name":            {objectMetadata, metaName, mandatory},
	"metadata.namespace":       {objectMetadata, metaNamespace, mandatory},
	"spec.nodeName":            {podSpec, specNode, optional},
	"spec.restartPolicy":       {podSpec, specRestartPolicy, mandatory},
	"spec.schedulerName":       {podSpec, specScheduler, mandatory},
	"spec.serviceAccountName":  {podSpec, specServiceAccount, mandatory},
	"status.phase":             {podStatus, statusPhase, mandatory},
	"status.nominatedNodeName": {podStatus, statusNominatedNode, optional},
}

// PodSelected tells whether labels and fields of a stored pod are selected, without decoding it; ok = false when that cannot be told so. Whether its shard is, it does not
// look at.
func PodSelected(stored []byte, p *storage.SelectionPredicate) (selected, ok bool) {
	raw, err := unwrap(stored, podTypeMeta)
	if err != nil {
		return false, false
	}
	if !p.Label.Empty() {
		meta, ok := last(raw, objectMetadata)
		l := podLabels{meta: meta}
		if selected := p.Label.Matches(&l); !ok || l.failed || !selected {
			return false, ok && !l.failed
		}
	}
	if p.Field == nil || p.Field.Empty() {
		return true, true
	}
	f := podFields{raw: raw}
	selected = p.Field.Matches(&f)
	return selected, !f.failed
}

// podFields is a fields.Fields of a pod without its envelope.
type podFields struct {
	raw    []byte
	failed bool // some could not be read
}

// Has implements fields.Fields.
func (f *podFields) Has(string) bool { return true }

// Get implements fields.Fields.
func (f *podFields) Get(name string) string {
	at, ok := selectable[name]
	var v []byte
	if ok {
		v, ok = last(f.raw, at.part)
	}
	if ok {
		v, ok = last(v, at.field)
	}
	f.failed = f.failed || !ok || at.mandatory && len(v) == 0
	return string(v)
}

// podLabels is a labels.Labels of the metadata of a pod.
type podLabels struct {
	meta   []byte
	failed bool // they could not be read
}

// Has implements labels.Labels.
func (l *podLabels) Has(label string) bool { _, there := l.Lookup(label); return there }

// Get implements labels.Labels.
func (l *podLabels) Get(label string) string { v, _ := l.Lookup(label); return v }

// Lookup implements labels.Labels.
func (l *podLabels) Lookup(label string) (value string, there bool) {
	l.failed = l.failed || !fields(l.meta, func(n protowire.Number, _, _ int, v []byte) bool {
		if n != metaLabels {
			return true
		}
		key, ok := last(v, entryKey)
		if ok && string(key) == label {
			key, ok = last(v, entryValue)
			value, there = string(key), true
		}
		return ok
	})
	return value, there
}
