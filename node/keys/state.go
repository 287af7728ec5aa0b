package keys

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// StoreKey is where the record lies in the store.
const StoreKey = "/skein/cluster/keyring"

const recordVersion = 1

// Phase of a rotation.
type Phase string

// The phases, in their order.
const (
	Requested Phase = "requested" // somebody asked for it
	Spreading Phase = "spreading" // the new key goes to all replicas
	Resealing Phase = "resealing" // it is the primary one; what is stored is sealed anew
	Retiring  Phase = "retiring"  // nothing needs the old key; the replicas drop it
)

// Record is the state of the cluster's keys in the store. It has no secret.
type Record struct {
	Version int `json:"version"`
	// Primary is the id of the key that seals.
	Primary  string    `json:"primary"`
	Rotation *Rotation `json:"rotation,omitempty"`
	// Retired are keys that replicas drop.
	Retired []Retired `json:"retired,omitempty"`
	// Last is how the latest rotation ended.
	Last *Outcome `json:"last,omitempty"`
}

// Rotation is one that has not ended.
type Rotation struct {
	ID    string    `json:"id"` // of the request, so that whoever asked finds the outcome
	Phase Phase     `json:"phase"`
	Force bool      `json:"force,omitempty"` // go on although a voter does not answer
	From  string    `json:"from,omitempty"`  // the old key
	To    string    `json:"to,omitempty"`    // the new one
	Asked time.Time `json:"asked"`           // by the clock of the node that was asked
	Done  int       `json:"done"`            // values sealed anew
	Total int       `json:"total"`           // values to be sealed anew
	Waits string    `json:"waits,omitempty"` // what it waits for, for people
}

// Retired is a key that a replica drops once its copy of each shard has been compacted at the revision.
type Retired struct {
	Key       string           `json:"key"`
	Revisions map[string]int64 `json:"revisions,omitempty"` // by shard; none: at once
}

// Outcome is how a rotation ended.
type Outcome struct {
	ID      string    `json:"id"`
	From    string    `json:"from,omitempty"`
	To      string    `json:"to,omitempty"`
	Refused string    `json:"refused,omitempty"` // why nothing was done
	Ended   time.Time `json:"ended"`             // by the leader's clock
	Written int       `json:"written,omitempty"` // values sealed anew
}

// ErrRecord says that the record in the store cannot be read.
var ErrRecord = errors.New("the record of the cluster's keys cannot be read")

// Encode writes the record as it is stored.
func (r Record) Encode() []byte {
	r.Version = recordVersion
	b, err := json.Marshal(r)
	if err != nil {
		panic(fmt.Sprintf("keys: %v", err)) // strings, numbers and times of our own making
	}
	return b
}

// Decode reads what Encode wrote. Errors wrap ErrRecord.
func Decode(b []byte) (Record, error) {
	var r Record
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(&r); err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrRecord, err)
	}
	switch {
	case r.Version > recordVersion:
		return Record{}, fmt.Errorf("%w: it has version %d, this skein knows versions up to %d: upgrade this node", ErrRecord, r.Version, recordVersion)
	case r.Version < 1 || r.Primary == "":
		return Record{}, fmt.Errorf("%w: it has version %d and the primary key %q", ErrRecord, r.Version, r.Primary)
	}
	return r, nil
}

// clone makes a copy that can be changed.
func (r Record) clone() Record {
	if r.Rotation != nil {
		x := *r.Rotation
		r.Rotation = &x
	}
	r.Retired = append([]Retired(nil), r.Retired...)
	return r
}
