package identity

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Generation says that the cluster's store was replaced: by a restore from a backup, or by the recovery of one node's data.
// Members of an earlier generation give theirs up for it, so it takes the cluster's CA to make one.
type Generation struct {
	Version   int    `json:"version"`
	ClusterID string `json:"clusterID"`
	// Number counts from 1; a cluster that was never replaced has none.
	Number uint64 `json:"number"`
	// Node that made it, when by its clock, and why; for people.
	Node string    `json:"node"`
	Time time.Time `json:"time"`
	Why  string    `json:"why"`
}

const (
	generationVersion = 1
	// generationContext keeps the signature apart from every other one of the CA's key.
	generationContext = "skein generation 1\x00"
	maxGeneration     = 4096 // bytes of a proof; no node name or reason is near it
)

// ErrBadGeneration is wrapped by every refusal of a generation's proof.
var ErrBadGeneration = errors.New("generation refused")

// signedGeneration is the proof's form: the statement as it was signed.
type signedGeneration struct {
	Statement []byte `json:"statement"`
	Signature []byte `json:"signature"` // ECDSA, ASN.1, of SHA-256(generationContext statement)
}

func generationDigest(statement []byte) []byte {
	sum := sha256.Sum256(append([]byte(generationContext), statement...))
	return sum[:]
}

// SignGeneration makes the proof of a generation of the authority's cluster.
func (a *Authority) SignGeneration(g Generation) ([]byte, error) {
	g.Version, g.ClusterID = generationVersion, CAClusterID(a.Cert)
	if g.Number == 0 {
		return nil, fmt.Errorf("%w: number 0", ErrBadGeneration)
	}
	statement, err := json.Marshal(g)
	if err != nil {
		return nil, fmt.Errorf("generation: %w", err)
	}
	signature, err := ecdsa.SignASN1(rand.Reader, a.Key, generationDigest(statement))
	if err != nil {
		return nil, fmt.Errorf("generation: %w", err)
	}
	return json.Marshal(signedGeneration{statement, signature})
}

// VerifyGeneration reads a proof. Errors wrap ErrBadGeneration.
func VerifyGeneration(ca *x509.Certificate, proof []byte) (g Generation, err error) {
	refuse := func(why string) (Generation, error) {
		return Generation{}, fmt.Errorf("%w: %s", ErrBadGeneration, why)
	}
	var s signedGeneration
	if len(proof) > maxGeneration || json.Unmarshal(proof, &s) != nil {
		return refuse("it cannot be read")
	}
	key, ok := ca.PublicKey.(*ecdsa.PublicKey)
	if !ok || !ecdsa.VerifyASN1(key, generationDigest(s.Statement), s.Signature) {
		return refuse("the cluster's CA has not signed it")
	}
	if err := json.Unmarshal(s.Statement, &g); err != nil {
		return refuse("its statement cannot be read")
	}
	switch {
	case g.Version != generationVersion:
		return refuse(fmt.Sprintf("it has version %d, this skein knows %d: upgrade this node", g.Version, generationVersion))
	case g.ClusterID != CAClusterID(ca):
		return refuse(fmt.Sprintf("it is of cluster %q", g.ClusterID))
	case g.Number == 0:
		return refuse("number 0")
	}
	return g, nil
}
