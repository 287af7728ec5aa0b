package identity

import (
	"bytes"
	"crypto/rand"
	"errors"
	"testing"
	"time"
)

func TestGeneration(t *testing.T) {
	now := time.Unix(1e9, 0).UTC()
	a, err := NewAuthority("one", now, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewAuthority("one", now, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	proof, err := a.SignGeneration(Generation{Number: 3, Node: "n1", Time: now, Why: "test"})
	if err != nil {
		t.Fatal(err)
	}
	g, err := VerifyGeneration(a.Cert, proof)
	if err != nil || g != (Generation{1, "one", 3, "n1", now, "test"}) {
		t.Errorf("%+v, %v", g, err)
	}
	if _, err := VerifyGeneration(other.Cert, proof); !errors.Is(err, ErrBadGeneration) {
		t.Errorf("another cluster's CA: %v", err)
	}
	for i := range proof {
		bad := bytes.Clone(proof)
		bad[i] ^= 1
		if g, err := VerifyGeneration(a.Cert, bad); err == nil && g.Number != 3 {
			t.Errorf("byte %d changed: %+v", i, g)
		}
	}
	if _, err := a.SignGeneration(Generation{}); err == nil {
		t.Error("signed generation 0")
	}
}

func FuzzVerifyGeneration(f *testing.F) {
	a, err := NewAuthority("one", time.Now(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	proof, err := a.SignGeneration(Generation{Number: 1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(proof)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if g, err := VerifyGeneration(a.Cert, b); err != nil && !errors.Is(err, ErrBadGeneration) || err == nil && g.Number != 1 {
			t.Errorf("%+v, %v", g, err)
		}
	})
}
