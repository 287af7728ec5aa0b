package resourcemetrics

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metainternalversion "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/metrics/pkg/apis/metrics"
)

// selectors reads those of a list; known are the fields that may be selected by.
func selectors(opts *metainternalversion.ListOptions, resource string, known ...string) (labels.Selector, fields.Selector, error) {
	label, field := labels.Everything(), fields.Everything()
	if opts != nil && opts.LabelSelector != nil {
		label = opts.LabelSelector
	}
	if opts != nil && opts.FieldSelector != nil {
		field = opts.FieldSelector
	}
	for _, r := range field.Requirements() {
		if !slices.Contains(known, r.Field) {
			return nil, nil, apierrors.NewBadRequest(fmt.Sprintf("field label not supported for %s.%s: %s (only %v are)", resource, metrics.GroupName, r.Field, known))
		}
	}
	return label, field, nil
}

// columns are metrics-server's.
func columns() []metav1.TableColumnDefinition {
	return []metav1.TableColumnDefinition{
		{Name: "Name", Type: "string", Format: "name", Description: "Name of the resource"},
		{Name: string(corev1.ResourceCPU), Type: "string", Format: "quantity"},
		{Name: string(corev1.ResourceMemory), Type: "string", Format: "quantity"},
		{Name: "Window", Type: "string", Format: "duration"},
	}
}

func row(o runtime.Object, name string, window metav1.Duration, used corev1.ResourceList) metav1.TableRow {
	return metav1.TableRow{Cells: []any{name, used.Cpu().String(), used.Memory().String(), window.Duration.String()}, Object: runtime.RawExtension{Object: o}}
}

// ConvertToTable implements rest.TableConvertor.
func (*nodes) ConvertToTable(_ context.Context, o, _ runtime.Object) (*metav1.Table, error) {
	table := &metav1.Table{ColumnDefinitions: columns()}
	add := func(m *metrics.NodeMetrics) { table.Rows = append(table.Rows, row(m, m.Name, m.Window, m.Usage)) }
	switch o := o.(type) {
	case *metrics.NodeMetrics:
		add(o)
	case *metrics.NodeMetricsList:
		for i := range o.Items {
			add(&o.Items[i])
		}
	default:
		return nil, fmt.Errorf("no table of a %T", o)
	}
	return table, nil
}

// ConvertToTable implements rest.TableConvertor.
func (*pods) ConvertToTable(_ context.Context, o, _ runtime.Object) (*metav1.Table, error) {
	table := &metav1.Table{ColumnDefinitions: columns()}
	add := func(m *metrics.PodMetrics) {
		sum := corev1.ResourceList{}
		for _, c := range m.Containers {
			for name, q := range c.Usage {
				total := sum[name]
				total.Add(q)
				sum[name] = total
			}
		}
		table.Rows = append(table.Rows, row(m, m.Name, m.Window, sum))
	}
	switch o := o.(type) {
	case *metrics.PodMetrics:
		add(o)
	case *metrics.PodMetricsList:
		for i := range o.Items {
			add(&o.Items[i])
		}
	default:
		return nil, fmt.Errorf("no table of a %T", o)
	}
	return table, nil
}
