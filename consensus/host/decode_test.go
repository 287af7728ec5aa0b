package host

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Whatever comes from the network is a frame, or an error.
func FuzzFrame(f *testing.F) {
	f.Add(appendFrame(nil, frameCall, []byte("{}")))
	f.Add(appendFrame(appendFrame(nil, frameEnd, nil), frameBatch, []byte{1, 2, 3}))
	f.Add([]byte{frameBatch, 0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		var buf bytes.Buffer
		read := 0
		for {
			kind, err := readFrame(r, &buf)
			if err != nil {
				return
			}
			again := appendFrame(nil, kind, buf.Bytes())
			if !bytes.Equal(again, b[read:read+len(again)]) {
				t.Fatalf("frame at %d reads as %x", read, again)
			}
			read += len(again)
		}
	})
}

// Every call gets an answer that the caller can read.
func FuzzCall(f *testing.F) {
	for _, m := range []string{methodRemoved, methodProgress, methodRenew, methodTTL, methodCampaign, methodMember, methodState, methodGeneration, "nonsense"} {
		b, err := json.Marshal(callRequest{Method: m, Shard: 1, Replica: 2, From: "x"})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("{"))
	h := &Host{disk: &prober{}}
	h.gen.Store(newGeneration(0, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var q callRequest
		var resp callResponse
		if err := json.Unmarshal(h.answer(context.Background(), nil, b), &resp); err != nil {
			t.Fatal(err)
		}
		if json.Unmarshal(b, &q) == nil && (q.Method == methodState || q.Method == methodGeneration) {
			return // asked of the node, not of a replica
		}
		if resp.Error == "" {
			t.Fatal("a host without replicas gave an answer")
		}
	})
}

func FuzzTermFile(f *testing.F) {
	f.Add([]byte("1 77\n"))
	f.Add([]byte("2 77\n"))
	f.Add([]byte("1 -1"))
	path := filepath.Join(f.TempDir(), "term")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		terms, err := openTerms(path)
		if err != nil {
			return
		}
		if !strings.HasPrefix(strings.TrimSpace(string(b)), "1 ") {
			t.Fatalf("%q was read as term %d", b, terms.term)
		}
		if err := terms.admit(terms.term); err != nil {
			t.Fatal(err)
		}
	})
}

// A caller that may not speak for the node that it names is turned away.
func TestCallIsAuthorised(t *testing.T) {
	h := &Host{cfg: Config{Authorize: func(_ *x509.Certificate, id string) error {
		if id != "good" {
			return errors.New("not you")
		}
		return nil
	}}}
	h.gen.Store(newGeneration(0, nil))
	for from, want := range map[string]string{"bad": "not you", "good": ErrNoReplica.Error()} {
		b, err := json.Marshal(callRequest{Method: methodProgress, Shard: 1, From: from})
		if err != nil {
			t.Fatal(err)
		}
		var resp callResponse
		if err := json.Unmarshal(h.answer(context.Background(), nil, b), &resp); err != nil || resp.Error != want {
			t.Errorf("%s: %+v %v", from, resp, err)
		}
	}
}
