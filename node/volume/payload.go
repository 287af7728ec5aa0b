package volume

import (
	"context"
	"fmt"
	"os"
	"path"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// Source answers from the node's own copy of the cluster. Errors: a NotFound API error says that there is none for sure;
// any other means that it is not known yet.
type Source interface {
	ConfigMap(namespace, name string) (*corev1.ConfigMap, error)
	Secret(namespace, name string) (*corev1.Secret, error)
	Claim(namespace, name string) (*corev1.PersistentVolumeClaim, error)
	Volume(name string) (*corev1.PersistentVolume, error)
}

const defaultFileMode = 0o644

func isTrue(b *bool) bool { return b != nil && *b }

func modeOf(mode *int32, fallback os.FileMode) os.FileMode {
	if mode == nil {
		return fallback
	}
	return os.FileMode(*mode) & os.ModePerm
}

// project selects keys of a ConfigMap or Secret into files. With no items it takes every key.
func project(into Payload, data map[string][]byte, items []corev1.KeyToPath, mode os.FileMode, optional bool, what string) error {
	if len(items) == 0 {
		for k, v := range data {
			into[k] = File{Data: v, Mode: mode}
		}
		return nil
	}
	for _, it := range items {
		v, ok := data[it.Key]
		if !ok {
			if optional {
				continue
			}
			return fmt.Errorf("%s references non-existent key: %s", what, it.Key)
		}
		into[path.Clean(it.Path)] = File{Data: v, Mode: modeOf(it.Mode, mode)}
	}
	return nil
}

func (m *Manager) configMap(into Payload, ns, name string, items []corev1.KeyToPath, mode os.FileMode, optional bool) error {
	c, err := m.cfg.Source.ConfigMap(ns, name)
	if err != nil {
		if optional && apierrors.IsNotFound(err) {
			return nil
		}
		return err
	}
	data := make(map[string][]byte, len(c.Data)+len(c.BinaryData))
	for k, v := range c.Data {
		data[k] = []byte(v)
	}
	for k, v := range c.BinaryData {
		data[k] = v
	}
	return project(into, data, items, mode, optional, "configmap")
}

func (m *Manager) secret(into Payload, ns, name string, items []corev1.KeyToPath, mode os.FileMode, optional bool) error {
	s, err := m.cfg.Source.Secret(ns, name)
	if err != nil {
		if optional && apierrors.IsNotFound(err) {
			return nil
		}
		return err
	}
	return project(into, s.Data, items, mode, optional, "secret")
}

func downward(into Payload, pod *corev1.Pod, facts PodFacts, items []corev1.DownwardAPIVolumeFile, mode os.FileMode) error {
	for i := range items {
		it := &items[i]
		var v string
		var err error
		switch {
		case it.FieldRef != nil:
			v, err = FieldValue(pod, facts, it.FieldRef.FieldPath)
		case it.ResourceFieldRef != nil:
			v, err = ResourceValue(pod, nil, facts, it.ResourceFieldRef)
		}
		if err != nil {
			return err
		}
		into[path.Clean(it.Path)] = File{Data: []byte(v), Mode: modeOf(it.Mode, mode)}
	}
	return nil
}

// payload computes the content of a volume that is made of files, false for other kinds.
func (m *Manager) payload(ctx context.Context, pod *corev1.Pod, facts PodFacts, v *corev1.Volume) (Payload, bool, error) {
	out := Payload{}
	var err error
	switch {
	case v.ConfigMap != nil:
		s := v.ConfigMap
		err = m.configMap(out, pod.Namespace, s.Name, s.Items, modeOf(s.DefaultMode, defaultFileMode), isTrue(s.Optional))
	case v.Secret != nil:
		s := v.Secret
		err = m.secret(out, pod.Namespace, s.SecretName, s.Items, modeOf(s.DefaultMode, defaultFileMode), isTrue(s.Optional))
	case v.DownwardAPI != nil:
		err = downward(out, pod, facts, v.DownwardAPI.Items, modeOf(v.DownwardAPI.DefaultMode, defaultFileMode))
	case v.Projected != nil:
		err = m.projected(ctx, out, pod, facts, v.Projected)
	default:
		return nil, false, nil
	}
	return out, true, err
}

func (m *Manager) projected(ctx context.Context, into Payload, pod *corev1.Pod, facts PodFacts, v *corev1.ProjectedVolumeSource) error {
	mode := modeOf(v.DefaultMode, defaultFileMode)
	for i := range v.Sources {
		s := &v.Sources[i]
		var err error
		switch {
		case s.ConfigMap != nil:
			err = m.configMap(into, pod.Namespace, s.ConfigMap.Name, s.ConfigMap.Items, mode, isTrue(s.ConfigMap.Optional))
		case s.Secret != nil:
			err = m.secret(into, pod.Namespace, s.Secret.Name, s.Secret.Items, mode, isTrue(s.Secret.Optional))
		case s.DownwardAPI != nil:
			err = downward(into, pod, facts, s.DownwardAPI.Items, mode)
		case s.ServiceAccountToken != nil:
			var tok string
			if tok, err = m.token(ctx, pod, s.ServiceAccountToken); err == nil {
				f := File{Data: []byte(tok), Mode: mode, UID: commonUser(pod)}
				if f.UID != nil || fsGroup(pod) != nil {
					f.Mode = 0o600 // fsGroup adds the group's right to read
				}
				into[path.Clean(s.ServiceAccountToken.Path)] = f
			}
		default:
			err = fmt.Errorf("projected source %d is of a kind this node does not support (supported: configMap, secret, downwardAPI, serviceAccountToken)", i)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
