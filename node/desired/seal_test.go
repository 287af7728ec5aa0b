package desired

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const hidden = "a-value-that-nobody-may-find"

// fill puts a Secret, a ConfigMap and a token into a file.
func fill(t *testing.T, path string, key []byte) {
	t.Helper()
	s, err := Open(path, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	meta := metav1.ObjectMeta{Namespace: "default", Name: "x"}
	s.mu.Lock()
	s.secrets.items["default/x"] = &corev1.Secret{ObjectMeta: meta, Data: map[string][]byte{"password": []byte(hidden)}}
	s.configmaps.items["default/x"] = &corev1.ConfigMap{ObjectMeta: meta, Data: map[string]string{"k": "in-clear"}}
	s.changed(Secrets, "default/x")
	s.changed(ConfigMaps, "default/x")
	s.mu.Unlock()
	s.PutToken("u", "api", &authv1.TokenRequest{Status: authv1.TokenRequestStatus{Token: hidden}})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// check opens the file and tells whether Secret and token are there.
func check(t *testing.T, path string, key []byte, want bool) {
	t.Helper()
	s, err := Open(path, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	x, err := s.Secret("default", "x")
	if got := err == nil && string(x.Data["password"]) == hidden; got != want {
		t.Errorf("Secret: %v, %v, want it: %v", x, err, want)
	}
	if got := s.Token("u", "api") != nil && s.Token("u", "api").Status.Token == hidden; got != want {
		t.Errorf("token is there: %v, want %v", got, want)
	}
	if m, err := s.ConfigMap("default", "x"); err != nil || m.Data["k"] != "in-clear" {
		t.Errorf("ConfigMap: %v, %v", m, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func contains(t *testing.T, path, what string) bool {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Contains(b, []byte(what))
}

func TestSecretsAreSealedInTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "desired.db")
	fill(t, path, testKey)
	if contains(t, path, hidden) || !contains(t, path, "in-clear") {
		t.Fatal("a secret is in clear in the file, or nothing is")
	}
	check(t, path, testKey, true)
	// Another key: nothing is known of them, and they are gone with the next write; the rest stays.
	other := bytes.Repeat([]byte{8}, KeySize)
	check(t, path, other, false)
	check(t, path, testKey, false)
	if _, err := os.Stat(path + ".corrupt"); err == nil {
		t.Error("the file was taken for corrupt")
	}
	if _, err := Open(path, []byte("short"), nil); err == nil {
		t.Error("a short key was taken")
	}
}

func TestPlainFileIsSealed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "desired.db")
	fill(t, path, nil)
	if !contains(t, path, hidden) {
		t.Fatal("nothing to seal")
	}
	check(t, path, testKey, true) // closing writes
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.View(func(tx *bbolt.Tx) error {
		for _, k := range []Kind{Secrets, tokens} {
			if err := tx.Bucket([]byte(k)).ForEach(func(key, v []byte) error {
				if flag, _, err := open(v); err != nil || flag != flagSealed || bytes.Contains(v, []byte(hidden)) {
					t.Errorf("%s %s has flag %d, %v", k, key, flag, err)
				}
				return nil
			}); err != nil {
				return err
			}
		}
		return nil
	}), db.Close()); err != nil {
		t.Fatal(err)
	}
	check(t, path, testKey, true)
}

func TestSealedEntryIsBoundToItsPlace(t *testing.T) {
	s, err := newSealer(testKey)
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.seal(Secrets, "a/x", []byte(hidden))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.open(Secrets, "a/x", b); err != nil || string(got) != hidden {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := s.open(Secrets, "b/x", b); err == nil {
		t.Error("it opens at another place")
	}
	if _, err := s.open(tokens, "a/x", b); err == nil {
		t.Error("it opens as another kind")
	}
}
